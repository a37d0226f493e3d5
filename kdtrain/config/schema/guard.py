"""Section guard: what is watched during a long run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class GuardSection:
    """What is watched during a long run. Only max_skipped_steps and stall_exit_s end it; all other settings warn."""

    max_skipped_steps: int = 0
    """Consecutive steps with a non-finite loss or gradient that are skipped (weights, optimizer and its step counts
    stay; the step's tokens count as seen) before the run ends with exit code 4. 0: the first one ends it."""
    spike_sigmas: float | None = 6.0
    """Warn of a step whose loss is this many standard deviations above the mean of up to 100 steps before it. Checked
    when steps are reported or saved. null: off."""
    stall_warn_s: float | None = 300.0
    """Seconds a step, an evaluation or a save may take before every rank logs which ranks are behind. null: off."""
    stall_exit_s: float | None = None
    """Seconds after which a rank that waits prints the phases of all ranks and its stack traces, and exits with code 1.
    null: the timeout of collectives ends the wait (DEEPSPEED_TIMEOUT minutes)."""
    data_wait_share: float = 0.1
    """Warn when a rank waits for data during more than this share of the steps' time. 1: never."""
