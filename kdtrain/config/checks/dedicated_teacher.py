"""Checks of a teacher on ranks of its own: whether a rank is left to the student, and what excludes this layout."""

from __future__ import annotations

from kdtrain.config.checks.report import Report
from kdtrain.config.objectives import traits_of
from kdtrain.config.schema import RunConfig, TeacherSection

MAX_IN_FLIGHT = 1024


def check_dedicated_teacher(cfg: RunConfig, world_size: int, report: Report) -> None:
    """Check teacher.layout = dedicated, and its settings in another layout. world_size: ranks of the whole job."""
    t = cfg.teacher
    if t.weights is None:
        return
    if t.layout != "dedicated":
        for key, value in (("teacher.ranks", t.ranks), ("teacher.in_flight", t.in_flight)):
            if value is not None:
                report.ignored(key, f"teacher.layout = {t.layout}", "set teacher.layout=dedicated, or null")
        return
    if t.zero_stage != 0:
        why = (
            "cannot be used with teacher.layout = dedicated: a dedicated rank serves requests in the order in which "
            "they arrive, and ranks that divide a teacher must all run at once"
        )
        report.add("teacher.zero_stage", why, "set teacher.zero_stage=0, and cut a large teacher with teacher.tp")
    if t.overlap:
        fix = "set teacher.overlap=false; teacher.in_flight sets how far ahead it runs"
        report.ignored("teacher.overlap", "teacher.layout = dedicated always runs ahead", fix)
    if not traits_of(cfg.objective).needs_teacher:
        used = f"but objective.name = {cfg.objective.name} uses the teacher only in evaluations"
        report.add("teacher.layout", f"{used}: its ranks would be idle between them", "use teacher.layout=plain or tp")
    if t.in_flight is not None and not 1 <= t.in_flight <= MAX_IN_FLIGHT:
        report.add("teacher.in_flight", f"is not in [1, {MAX_IN_FLIGHT}]", "null: two per teacher")
    _ranks(t, world_size, report)


def _ranks(t: TeacherSection, world_size: int, report: Report) -> None:
    key, ranks, tp = "teacher.ranks", t.ranks, t.tp
    if ranks is None:
        fix = "set it to the number of the job's ranks that hold the teacher"
        report.add(key, "but teacher.layout = dedicated needs a number of ranks", fix)
    elif ranks < 1:
        report.at_least(key, 1)
    elif ranks >= world_size:
        fix = f"start more than {ranks} ranks (deepspeed --num_accelerators), or set teacher.layout=plain"
        report.add(key, f"leaves no rank for the student: the job has {world_size}", fix)
    elif tp is not None and (tp < 1 or ranks % tp):
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        report.add("teacher.tp", f"does not divide teacher.ranks = {ranks}", f"use one of {divisors}, or null")
