"""Which name of a tied parameter files keep. transformers ties a head to its embedding, rarely anything else."""

from __future__ import annotations

from typing import Any


def tied_names(model: Any) -> dict[str, str]:
    """Second name -> name under which `save_pretrained` keeps the parameter, for all that the model's class may tie."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def kept_name(model: Any, name: str) -> str:
    """The name under which files keep the parameter `name`: its own unless it is tied to another one in `model`."""
    kept = tied_names(model).get(name, name)
    return kept if kept == name or model.get_parameter(kept) is model.get_parameter(name) else name
