"""Section schedule: the learning rate as a function of tokens seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True, slots=True)
class ScheduleSection:
    """Learning rate as a function of tokens seen."""

    shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine or linear decay to the end; wsd stays at the peak, then decays linearly over
    decay_tokens; constant stays."""
    warmup_tokens: int = 0
    """Linear warm-up from 0."""
    decay_tokens: int | None = None
    """wsd: length of the final decay. null: a tenth of train.total_tokens."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a share of the peak."""
