"""Checks of section parallel; those of parallel.cp are in context_parallel.py."""

from __future__ import annotations

from kdtrain.config.checks.report import Report
from kdtrain.config.ranks import student_ranks, teacher_ranks
from kdtrain.config.schema import RunConfig


def check_parallel(cfg: RunConfig, world_size: int, report: Report) -> None:
    """Whether the ranks of the job are the expected ones and can be divided by tp. world_size: all ranks of the job."""
    _world_size(cfg.parallel.world_size, world_size, report)
    tp, seq_len, num_students = cfg.parallel.tp, cfg.data.seq_len, student_ranks(cfg, world_size)
    if tp < 1:
        report.at_least("parallel.tp", 1, "1 means that each rank holds the whole student")
        return
    cp = max(1, cfg.parallel.cp)
    if cfg.parallel.sequence and (tp == 1 or seq_len // cp % tp):
        why = f"needs ranks to share the tokens: parallel.tp = {tp}, parallel.cp = {cp}, data.seq_len = {seq_len}"
        fix = "set parallel.tp above 1 and data.seq_len to a multiple of tp x cp, or parallel.sequence=false"
        report.add("parallel.sequence", why, fix)
    if num_students % tp:
        divisors = [n for n in range(1, num_students + 1) if num_students % n == 0]
        ranks = "the student's ranks" if teacher_ranks(cfg) else "ranks"
        fix = f"use one of {divisors}, or start a multiple of {tp} ranks (deepspeed --num_accelerators {tp})"
        report.add("parallel.tp", f"does not divide the number of {ranks} ({num_students})", fix)


def _world_size(expected: int | None, world_size: int, report: Report) -> None:
    key = "parallel.world_size"
    if expected is not None and expected < 1:
        report.at_least(key, 1, "use the number of ranks of the job, or null")
    elif expected is not None and expected != world_size:
        fix = (
            "check the launcher: deepspeed starts this node alone when it does not find its --hostfile "
            "(/job/hostfile unless named), srun starts --ntasks ranks; or set parallel.world_size=null"
        )
        report.add(key, f"ranks are expected, and {world_size} {'was' if world_size == 1 else 'were'} started", fix)
