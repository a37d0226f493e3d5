"""What a run knows about its own past."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Progress:
    """Saved with every checkpoint, restored on resume; equal on all ranks except `metrics`.

    step: optimizer steps done. tokens_seen: tokens of all ranks, padding included. train_seconds: wall-clock spent in
    steps, without evaluation, saving and start-up. metrics: sums since the last report (data rank 0 holds them all).
    """

    step: int = 0
    tokens_seen: int = 0
    train_seconds: float = 0.0
    metrics: dict[str, list[float]] = field(default_factory=dict)
