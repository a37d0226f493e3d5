"""Section eval: evaluation on held-out tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class EvalSection:
    """Validation on data.validation."""

    every_steps: int | None = None
    """Steps between evaluations; also run before the first and after the last step. null: only those two."""
    max_tokens: int | None = None
    """Evaluate on at most this many tokens of the store (the same ones each time). null: all."""
