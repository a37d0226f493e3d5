"""Checks of section teacher; those of layout dedicated are in dedicated_teacher.py."""

from __future__ import annotations

from dataclasses import fields

from kdtrain.config.checks.attention import check_attention
from kdtrain.config.checks.report import Report
from kdtrain.config.objectives import traits_of, without_teacher
from kdtrain.config.problems import show
from kdtrain.config.schema import RunConfig, TeacherSection


def check_teacher(cfg: RunConfig, num_students: int, report: Report) -> None:
    """Whether a teacher is there when one is needed, its layout and what bounds its memory.

    num_students: ranks of the job that hold the student.
    """
    if cfg.teacher.weights is None:
        _no_teacher(cfg, report)
        return
    check_attention("teacher", cfg.teacher, report)
    _layout(cfg, num_students, report)
    _quantize(cfg.teacher, report)
    _tokens_per_forward(cfg, report)
    _overlap(cfg, report)


def _no_teacher(cfg: RunConfig, report: Report) -> None:
    """dtype and attention may differ from their defaults: without a teacher they have no effect on any rank."""
    if traits_of(cfg.objective).needs_teacher:
        fix = f"name a Hugging Face model folder, or set {without_teacher()}"
        report.add("teacher.weights", f"but objective.name = {cfg.objective.name} needs a teacher", fix)
    for field in fields(TeacherSection):
        default = getattr(TeacherSection(), field.name)
        if getattr(cfg.teacher, field.name) != default and field.name not in ("dtype", "attention"):
            fix = f"set teacher.weights, or teacher.{field.name}={show(default)}"
            report.ignored(f"teacher.{field.name}", "teacher.weights = null", fix)


def _layout(cfg: RunConfig, num_students: int, report: Report) -> None:
    t, tp = cfg.teacher, cfg.parallel.tp
    if t.zero_stage not in (0, 3):
        fix = "0 keeps weights on every data rank, 3 divides them; stages 1 and 2 divide states of training"
        report.add("teacher.zero_stage", "is neither 0 nor 3", fix)
    if t.offload and t.zero_stage != 3:
        report.ignored("teacher.offload", "teacher.zero_stage is not 3", "set zero_stage=3 too")
    if t.tp is None or t.layout == "dedicated":
        return
    if t.layout != "tp":
        report.ignored("teacher.tp", "teacher.layout = plain", "set teacher.layout=tp, or null")
    elif tp >= 1 and (t.tp < 1 or t.tp % tp):
        report.add("teacher.tp", f"is not a multiple of parallel.tp = {tp}", f"use {tp}, {2 * tp} or {4 * tp}")
    elif num_students % t.tp:
        fix = f"use a divisor of {num_students}, or start a multiple of {t.tp} ranks"
        report.add("teacher.tp", f"does not divide the number of ranks ({num_students})", fix)


def _quantize(t: TeacherSection, report: Report) -> None:
    if t.quantize is None:
        return
    if t.zero_stage == 3:
        why = "cannot be used with teacher.zero_stage = 3, which divides ordinary weights only, without their scales"
        report.add("teacher.quantize", why, "cut the teacher with teacher.layout=tp, or teacher.quantize=null")
    elif t.layout == "dedicated":
        why = (
            "cannot be used with teacher.layout = dedicated: what it costs is measured where the head is, on the "
            "student's ranks"
        )
        report.add("teacher.quantize", why, "use teacher.layout=plain or tp")


def _tokens_per_forward(cfg: RunConfig, report: Report) -> None:
    limit, seq_len = cfg.teacher.max_tokens_per_forward, cfg.data.seq_len
    if limit is not None and limit < max(1, seq_len):
        why, fix = (
            f"is less than one sequence (data.seq_len = {seq_len})",
            f"use {seq_len} or more, or null for no limit",
        )
        report.add("teacher.max_tokens_per_forward", why, fix)


def _overlap(cfg: RunConfig, report: Report) -> None:
    key, off = "teacher.overlap", "set teacher.overlap=false"
    if cfg.teacher.overlap and not traits_of(cfg.objective).needs_teacher:
        report.ignored(key, f"objective.name = {cfg.objective.name} runs no teacher in a step", off)
    if cfg.teacher.overlap and cfg.teacher.zero_stage == 3:
        fix = f"{off}, or teacher.zero_stage=0 if the teacher fits"
        report.ignored(key, "with teacher.zero_stage = 3 a whole step runs ahead", fix)
