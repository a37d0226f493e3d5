"""Checks of parallel.cp against data and teacher; the heads are checked when the model is built."""

from __future__ import annotations

from kdtrain.config.checks.report import Report
from kdtrain.config.schema import RunConfig


def check_context_parallel(cfg: RunConfig, num_students: int, report: Report) -> None:
    """Everything about parallel.cp that needs no model. num_students: ranks of the job that hold the student."""
    tp, cp, seq_len = cfg.parallel.tp, cfg.parallel.cp, cfg.data.seq_len
    report.at_least("parallel.cp", 1, "1 means that each rank holds whole sequences")
    if cp <= 1:
        return
    if tp >= 1 and num_students % tp == 0 and num_students % (tp * cp):
        divisors = [n for n in range(1, num_students // tp + 1) if num_students // tp % n == 0]
        why = f"times parallel.tp = {tp} does not divide the number of ranks ({num_students})"
        report.add("parallel.cp", why, f"use one of {divisors}, or start a multiple of {tp * cp} ranks")
    if seq_len % cp:
        below = seq_len // cp * cp
        near = f"{below} or {below + cp}" if below > 0 else f"{cp}"
        why = f"is not a multiple of parallel.cp = {cp}, which share each sequence"
        report.add("data.seq_len", why, f"use {near}, or another parallel.cp")
    _teacher(cfg, report)


def _teacher(cfg: RunConfig, report: Report) -> None:
    tp, cp, t = cfg.parallel.tp, cfg.parallel.cp, cfg.teacher
    if t.weights is not None and t.layout == "tp" and t.tp is not None and tp >= 1 and t.tp > tp and t.tp % tp == 0:
        why = (
            f"differs from parallel.tp = {tp} while parallel.cp = {cp}: the ranks of such a teacher would hold parts "
            "of the same sequences, not batches of their own"
        )
        fix = "set teacher.tp=null, or teacher.layout=plain with teacher.zero_stage=3, or parallel.cp=1"
        report.add("teacher.tp", why, fix)
    if t.layout == "dedicated":
        why = f"while parallel.cp = {cp}: a dedicated teacher computes whole sequences"
        report.add("teacher.layout", why, "use teacher.layout=plain or tp, or parallel.cp=1")
