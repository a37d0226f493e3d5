"""Section guard: what a long run is watched for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class GuardSection:
    """What a long run watches for. Only max_skipped_steps and stall_exit_s ever act; everything else warns."""

    max_skipped_steps: int = 0
    """Consecutive steps with a non-finite loss or gradient that are skipped (weights, optimizer and its step counts
    stay; the step's tokens count as seen) before the run ends with exit code 4. 0: the first one ends it."""
    spike_sigmas: float | None = 6.0
    """Warn of a step whose loss is this many standard deviations above the mean of up to 100 steps before it. Looked
    at when steps are reported or saved. null: off."""
    stall_warn_s: float | None = 300.0
    """Seconds a step, an evaluation or a save may take before every rank names those that are behind. null: nobody
    watches."""
    stall_exit_s: float | None = None
    """Seconds after which a rank that waits shows what all ranks were doing, its stack traces, and exits with code 1.
    null: collectives end the wait (DEEPSPEED_TIMEOUT minutes)."""
    data_wait_share: float = 0.1
    """Warn when a rank waits for data during more than this share of the steps' time. 1: never."""
