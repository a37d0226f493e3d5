"""What context parallelism asks of a configuration."""

from __future__ import annotations

from collections.abc import Iterator

from kdtrain.config.problems import Problem
from kdtrain.config.schema import RunConfig


def context_problems(cfg: RunConfig, world_size: int) -> Iterator[Problem]:
    """What can be wrong with parallel.cp before a model is known; its heads are looked at when it is built."""
    tp, cp, t = cfg.parallel.tp, cfg.parallel.cp, cfg.teacher
    if cp < 1:
        yield Problem("parallel.cp", cp, "is smaller than 1", "1 means that each rank holds whole sequences")
        return
    if cp == 1:
        return
    if tp >= 1 and world_size % tp == 0 and world_size % (tp * cp):
        divisors = [n for n in range(1, world_size // tp + 1) if world_size // tp % n == 0]
        yield Problem(
            "parallel.cp",
            cp,
            f"times parallel.tp = {tp} does not divide the number of ranks ({world_size})",
            f"use one of {divisors}, or start a multiple of {tp * cp} ranks",
        )
    if cfg.data.seq_len % cp:
        below = cfg.data.seq_len // cp * cp
        near = f"{below} or {below + cp}" if below > 0 else f"{cp}"
        yield Problem(
            "data.seq_len",
            cfg.data.seq_len,
            f"is not a multiple of parallel.cp = {cp}, which share each sequence",
            f"use {near}, or another parallel.cp",
        )
    if t.weights is not None and t.layout == "tp" and t.tp is not None and tp >= 1 and t.tp > tp and t.tp % tp == 0:
        yield Problem(
            "teacher.tp",
            t.tp,
            f"differs from parallel.tp = {tp} while parallel.cp = {cp}: the ranks of such a "
            "teacher would hold parts of the same sequences, not batches of their own",
            "set teacher.tp=null, or teacher.layout=plain with teacher.zero_stage=3, or parallel.cp=1",
        )
    if t.layout == "dedicated":
        yield Problem(
            "teacher.layout",
            "dedicated",
            f"while parallel.cp = {cp}: such a teacher is asked for whole sequences",
            "use teacher.layout=plain or tp, or parallel.cp=1",
        )
