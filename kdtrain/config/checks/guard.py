"""Checks of section guard."""

from __future__ import annotations

from kdtrain.config.checks.report import Report
from kdtrain.config.schema import GuardSection


def check_guard(g: GuardSection, report: Report) -> None:
    """Limits of skipped steps, spikes, stalls and waiting."""
    if g.max_skipped_steps < 0:
        report.add("guard.max_skipped_steps", "is negative", "0 stops at the first such step")
    for name in ("spike_sigmas", "stall_warn_s", "stall_exit_s"):
        report.positive(f"guard.{name}", "null switches it off")
    if not 0 < g.data_wait_share <= 1:
        report.add("guard.data_wait_share", "is not in (0, 1]", "0.1 is usual, 1 never warns")
    if g.stall_exit_s is not None and g.stall_warn_s is None:
        fix = "set guard.stall_warn_s too, or guard.stall_exit_s=null"
        report.ignored("guard.stall_exit_s", "guard.stall_warn_s = null switches the watch off", fix)
    elif g.stall_exit_s is not None and g.stall_warn_s is not None and g.stall_exit_s < g.stall_warn_s:
        why = f"is less than guard.stall_warn_s = {g.stall_warn_s}"
        report.add("guard.stall_exit_s", why, "warn first, exit later")
