"""The counters of a run, saved in its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Progress:
    """Saved with every checkpoint, restored on resume; equal on all ranks except `metrics`.

    step: completed steps, each with its own data. tokens_seen: tokens of all ranks, padding included. train_seconds:
    wall-clock seconds in steps, without evaluation, saving and start-up. metrics: sums since the last report (data rank
    0 holds them all).
    skipped_steps, skipped_in_row: steps that were not applied because they were not finite, in total and since the last
    applied one; `step` counts them, AdamW does not. recent_losses: of the last applied steps, for guard.spike_sigmas.
    """

    step: int = 0
    tokens_seen: int = 0
    train_seconds: float = 0.0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    skipped_steps: int = 0
    skipped_in_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
