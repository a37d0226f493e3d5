"""What can be wrong with the section data besides its stores. Called by `validate.problems`."""

from __future__ import annotations

from collections.abc import Iterator

from kdtrain.config.problems import Problem
from kdtrain.config.schema import DataSection

MAX_PREFETCH = 1024


def data_problems(d: DataSection) -> Iterator[Problem]:
    """Of data.prefetch, and of data.sequence_prefix before a tokenizer is known."""
    if d.prefetch > MAX_PREFETCH:
        yield Problem("data.prefetch", d.prefetch, f"is larger than {MAX_PREFETCH} steps", "2 is plenty")
    if d.allow_worse_prefix and d.sequence_prefix == "auto":
        yield Problem(
            "data.allow_worse_prefix",
            True,
            "would be ignored: data.sequence_prefix = auto takes the better one",
            "name a token or none as data.sequence_prefix, or remove it",
        )
