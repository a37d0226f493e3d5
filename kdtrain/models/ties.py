"""Which of a tied parameter's names files keep. transformers ties a head to its embedding, seldom anything else."""

from __future__ import annotations

from typing import Any


def tied_names(model: Any) -> dict[str, str]:
    """Second name -> name under which `save_pretrained` keeps the parameter, for all that the model's class may tie."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def kept_name(model: Any, name: str) -> str:
    """The name under which files carry the parameter `name`, which is its own unless it is tied to another here."""
    kept = tied_names(model).get(name, name)
    return kept if kept == name or model.get_parameter(kept) is model.get_parameter(name) else name
