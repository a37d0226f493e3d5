"""Multimodal models: how to recognise their config.json, and the error that names a workaround."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kdtrain.errors import ConfigError

TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which a config.json keeps the settings of a language model inside a larger one."""


def refuse_composite(settings: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError for the settings of a model whose language model is only a part of it.

    settings: the content of a config.json. A model that has other parts beside a language model of its own (as
    phi4_multimodal) is not refused. source: name of the model in the message.
    """
    kind = str(settings.get("model_type"))
    declared = getattr(_config_class(kind), "sub_configs", {})
    part = next((key for key in TEXT_PARTS if isinstance(settings.get(key), Mapping) or key in declared), None)
    if part is None:
        return
    text = settings.get(part) or {}
    text_type = str(text.get("model_type") or getattr(declared.get(part), "model_type", None))
    is_causal = _config_class(text_type) in AutoModelForCausalLM._model_mapping
    others = ", ".join(sorted(key for key in {*settings, *declared} if key.endswith("_config") and key != part))
    fix = "use a model of text alone"
    if is_causal:
        fix = f"save its text part, of model_type {text_type!r}, as a folder of its own (docs/export.md), or {fix}"
    raise ConfigError(
        f"{source} has model_type {kind!r}: its language model is the part {part!r} of a larger model"
        f"{f' ({others})' if others else ''}; text-and-image models are not supported\n"
        "  why: its vocabulary, its layers and the names of its weights are those of the whole, of which text runs "
        f"through a part\n  fix: {fix}"
    )


def _config_class(model_type: str) -> Any:
    """None for a type that transformers does not have."""
    try:
        return CONFIG_MAPPING[model_type]
    except KeyError:
        return None
