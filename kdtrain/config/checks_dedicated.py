"""Teachers on ranks of their own: whether a rank is left to the student, and what does not go together."""

from __future__ import annotations

from collections.abc import Iterator

from kdtrain.config.problems import Problem
from kdtrain.config.schema import RunConfig

MAX_IN_FLIGHT = 1024


def problems(cfg: RunConfig, world_size: int) -> Iterator[Problem]:
    """What is wrong with teacher.layout = dedicated, and with its settings in another layout."""
    t = cfg.teacher
    if t.weights is None:
        return
    if t.layout != "dedicated":
        for name, value in (("ranks", t.ranks), ("in_flight", t.in_flight)):
            if value is not None:
                yield Problem(
                    f"teacher.{name}",
                    value,
                    f"would be ignored: teacher.layout = {t.layout}",
                    "set teacher.layout=dedicated, or null",
                )
        return
    if t.zero_stage != 0:
        yield Problem(
            "teacher.zero_stage",
            t.zero_stage,
            "cannot be used with teacher.layout = dedicated: those ranks answer "
            "whoever asks first, and ranks that divide a teacher must all run at once",
            "set teacher.zero_stage=0, and cut a large teacher with teacher.tp",
        )
    if t.overlap:
        yield Problem(
            "teacher.overlap",
            True,
            "would be ignored: teacher.layout = dedicated always works ahead",
            "set teacher.overlap=false, and how far ahead by teacher.in_flight",
        )
    if cfg.objective.name == "pretrain":
        yield Problem(
            "teacher.layout",
            t.layout,
            "but objective.name = pretrain asks the teacher only while it evaluates: "
            "its ranks would be idle all the time between",
            "use teacher.layout=plain or tp",
        )
    if t.in_flight is not None and not 1 <= t.in_flight <= MAX_IN_FLIGHT:
        yield Problem("teacher.in_flight", t.in_flight, f"is not in [1, {MAX_IN_FLIGHT}]", "null: two per teacher")
    yield from _ranks(cfg, world_size)


def _ranks(cfg: RunConfig, world_size: int) -> Iterator[Problem]:
    ranks, tp = cfg.teacher.ranks, cfg.teacher.tp
    if ranks is None:
        yield Problem(
            "teacher.ranks",
            None,
            "but teacher.layout = dedicated needs a number of ranks",
            "say how many of the job's ranks hold the teacher",
        )
    elif ranks < 1:
        yield Problem("teacher.ranks", ranks, "is smaller than 1", "use 1 or more")
    elif ranks >= world_size:
        yield Problem(
            "teacher.ranks",
            ranks,
            f"leaves no rank for the student: the job has {world_size}",
            f"start more than {ranks} ranks (deepspeed --num_accelerators), or set teacher.layout=plain",
        )
    elif tp is not None and (tp < 1 or ranks % tp):
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        yield Problem("teacher.tp", tp, f"does not divide teacher.ranks = {ranks}", f"use one of {divisors}, or null")
