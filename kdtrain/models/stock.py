"""Settings of a model's or a tokenizer's folder without those that lead away from the stock classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FOREIGN = ("auto_map", "custom_pipelines", "_name_or_path", "name_or_path", "_commit_hash", "quantization_config")
"""Keys that name code beside the file, a place where the model once was, or another form of its weights."""


def stock_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without FOREIGN keys: what kdtrain runs and writes are the classes of transformers with plain weights."""
    return {key: value for key, value in settings.items() if key not in FOREIGN}
