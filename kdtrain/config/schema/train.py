"""Section train: length of the run, and how the loss is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True, slots=True)
class TrainSection:
    """Length of the run and how the loss is computed."""

    total_tokens: int = "???"  # type: ignore[assignment]
    """The run ends once this many tokens (over all ranks, padding and sequence prefixes included) have been seen."""
    slab_bytes: int = 1 << 30
    """Budget in bytes for the loss's temporary logits; larger is faster up to a point."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Backend of the loss's row kernels. auto: triton on CUDA where one row can be launched, else torch; the reason is
    logged. An explicit choice never falls back."""
