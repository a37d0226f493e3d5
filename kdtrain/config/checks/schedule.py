"""Checks of section schedule against the length of the run."""

from __future__ import annotations

from kdtrain.config.checks.report import Report
from kdtrain.config.checks.train import has_a_step
from kdtrain.config.schema import RunConfig, ScheduleSection


def check_schedule(cfg: RunConfig, report: Report) -> None:
    """Whether warm-up and decay fit into the run, and whether the shape uses what is set.

    Skipped when the run is shorter than a step, which the check of train reports.
    """
    s, total = cfg.schedule, cfg.train.total_tokens
    if not has_a_step(cfg):
        return
    if not 0 <= s.warmup_tokens <= total:
        why = f"is not in [0, {total}] (train.total_tokens)"
        report.add("schedule.warmup_tokens", why, "a hundredth of the run is usual")
    elif s.shape == "wsd":
        _decay(s, total, report)
    if s.decay_tokens is not None and s.shape != "wsd":
        fix = "remove it, or set schedule.shape=wsd"
        report.ignored("schedule.decay_tokens", f"schedule.shape = {s.shape}", fix)
    if s.shape == "constant" and s.min_lr_ratio != ScheduleSection().min_lr_ratio:
        fix = "remove it, or choose a shape that decays"
        report.ignored("schedule.min_lr_ratio", "schedule.shape = constant", fix)
    if not 0 <= s.min_lr_ratio <= 1:
        report.add("schedule.min_lr_ratio", "is not in [0, 1]", "0.1 is usual")


def _decay(s: ScheduleSection, total: int, report: Report) -> None:
    key, left = "schedule.decay_tokens", total - s.warmup_tokens
    if s.decay_tokens is None and total // 10 > left:
        why = f"means {total // 10} tokens, but the warm-up leaves {left}"
        report.add(key, why, "shorten schedule.warmup_tokens, or set schedule.decay_tokens")
    if s.decay_tokens is not None and not 0 < s.decay_tokens <= left:
        why = f"is not in (0, {left}], what the warm-up leaves"
        report.add(key, why, "a tenth of train.total_tokens is usual")
