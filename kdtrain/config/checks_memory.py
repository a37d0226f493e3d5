"""Problems of the settings that trade time or precision for device memory, and of a teacher's without a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from kdtrain.config.problems import Problem, show
from kdtrain.config.schema import RunConfig, TeacherSection


def problems(cfg: RunConfig) -> Iterator[Problem]:
    """Problems that need nothing but the values."""
    yield from _offload_optimizer(cfg)
    if cfg.teacher.weights is None:
        yield from _no_teacher(cfg)
        return
    yield from _quantize(cfg)
    yield from _tokens_per_forward(cfg)
    yield from _overlap(cfg)


def _no_teacher(cfg: RunConfig) -> Iterator[Problem]:
    """dtype and attention may stay: they say what a teacher would be, not what ranks do."""
    for field in fields(TeacherSection):
        value, default = getattr(cfg.teacher, field.name), getattr(TeacherSection(), field.name)
        if value != default and field.name not in ("dtype", "attention"):
            yield Problem(
                f"teacher.{field.name}",
                value,
                "would be ignored: teacher.weights = null",
                f"set teacher.weights, or teacher.{field.name}={show(default)}",
            )


def _offload_optimizer(cfg: RunConfig) -> Iterator[Problem]:
    if cfg.zero.offload_optimizer and cfg.zero.stage == 0:
        yield Problem(
            "zero.offload_optimizer",
            True,
            "would be ignored: zero.stage = 0 steps the weights where they are",
            "use zero.stage=1, or set zero.offload_optimizer=false",
        )


def _tokens_per_forward(cfg: RunConfig) -> Iterator[Problem]:
    limit, seq_len = cfg.teacher.max_tokens_per_forward, cfg.data.seq_len
    if limit is not None and limit < max(1, seq_len):
        yield Problem(
            "teacher.max_tokens_per_forward",
            limit,
            f"is less than one sequence (data.seq_len = {seq_len})",
            f"use {seq_len} or more, or null for no limit",
        )


def _overlap(cfg: RunConfig) -> Iterator[Problem]:
    if not cfg.teacher.overlap:
        return
    if cfg.objective.name == "pretrain":
        yield Problem(
            "teacher.overlap",
            True,
            "would be ignored: objective.name = pretrain runs no teacher in a step",
            "set teacher.overlap=false",
        )
    if cfg.teacher.zero_stage == 3:
        yield Problem(
            "teacher.overlap",
            True,
            "would be ignored: with teacher.zero_stage = 3 a whole step runs ahead",
            "set teacher.overlap=false, or teacher.zero_stage=0 if the teacher fits",
        )


def _quantize(cfg: RunConfig) -> Iterator[Problem]:
    t = cfg.teacher
    if t.quantize is None:
        return
    if t.zero_stage == 3:
        yield Problem(
            "teacher.quantize",
            t.quantize,
            "cannot be used with teacher.zero_stage = 3, which divides ordinary weights only, without their scales",
            "cut the teacher with teacher.layout=tp, or teacher.quantize=null",
        )
    elif t.layout == "dedicated":
        yield Problem(
            "teacher.quantize",
            t.quantize,
            "cannot be used with teacher.layout = dedicated: what it costs is "
            "measured where the head is, on the student's ranks",
            "use teacher.layout=plain or tp",
        )
