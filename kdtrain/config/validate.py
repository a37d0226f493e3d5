"""Every reason a configuration cannot run, found before torch is imported and told all at once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from kdtrain.config.deepspeed_config import OWNED_ZERO_KEYS
from kdtrain.config.load import Loaded
from kdtrain.config.problems import Problem, format_problems
from kdtrain.config.schema import RunConfig
from kdtrain.errors import ConfigError

MIN_SLAB_BYTES = 1 << 20


def check(loaded: Loaded, *, world_size: int) -> None:
    """Raise one ConfigError with everything that is wrong; return if nothing is."""
    cfg = loaded.config
    found = [*problems(cfg, world_size=world_size), *missing_paths(cfg)]
    if found:
        raise ConfigError(format_problems(found, loaded.origins))


def problems(cfg: RunConfig, *, world_size: int) -> Iterator[Problem]:
    """Problems that need nothing but the values. World size: ranks that will run."""
    yield from _run(cfg)
    yield from _models(cfg)
    yield from _data(cfg)
    yield from _layout(cfg, world_size)
    yield from _objective(cfg)
    yield from _optimizer(cfg)
    yield from _schedule(cfg)
    yield from _cadence(cfg)


def _run(cfg: RunConfig) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", cfg.run.name):
        yield Problem("run.name", cfg.run.name, "cannot name a folder", "use letters, digits, '.', '_' and '-'")
    if cfg.run.seed < 0:
        yield Problem("run.seed", cfg.run.seed, "is negative", "use 0 or more")
    if cfg.run.time_limit_s is not None and cfg.run.time_limit_s <= 0:
        yield Problem("run.time_limit_s", cfg.run.time_limit_s, "is not positive", "give seconds, or null for no limit")


def _models(cfg: RunConfig) -> Iterator[Problem]:
    if (cfg.student.weights is None) == (cfg.student.architecture is None):
        yield Problem(
            "student.architecture", cfg.student.architecture,
            f"and student.weights = {cfg.student.weights or 'null'}: exactly one of them must be set",
            "architecture for a student from scratch, weights to start from a pretrained one",
        )  # fmt: skip
    if cfg.objective.name == "distill" and cfg.teacher.weights is None:
        yield Problem(
            "teacher.weights", None, "but objective.name = distill needs a teacher",
            "name a Hugging Face model folder, or set objective.name=pretrain",
        )  # fmt: skip


def _data(cfg: RunConfig) -> Iterator[Problem]:
    d = cfg.data
    if not d.train:
        yield Problem("data.train", d.train, "names no token store", "make one with launch/prepare_corpus.py")
    if d.train_weights is not None and (
        len(d.train_weights) != len(d.train) or any(not w > 0 or math.isinf(w) for w in d.train_weights)
    ):
        yield Problem(
            "data.train_weights", d.train_weights, f"does not give one positive weight for each of the {len(d.train)} "
            "stores in data.train", "list as many weights as stores, or null",
        )  # fmt: skip
    for name, least in (("seq_len", 2), ("tokens_per_step", 1), ("sequences_per_micro_batch", 1), ("prefetch", 0)):
        value = getattr(d, name)
        if value < least:
            yield Problem(f"data.{name}", value, f"is smaller than {least}", f"use {least} or more")


def _layout(cfg: RunConfig, world_size: int) -> Iterator[Problem]:
    tp = cfg.parallel.tp
    if tp < 1 or world_size % tp:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        yield Problem(
            "parallel.tp", tp, f"does not divide the number of ranks ({world_size})",
            f"use one of {divisors}, or start a multiple of {max(tp, 1)} ranks (deepspeed --num_accelerators N)",
        )  # fmt: skip
        return
    d, dp = cfg.data, world_size // tp
    unit = d.seq_len * d.sequences_per_micro_batch * dp
    if unit > 0 and d.tokens_per_step > 0 and d.tokens_per_step % unit:
        nearest = max(1, round(d.tokens_per_step / unit)) * unit
        yield Problem(
            "data.tokens_per_step", d.tokens_per_step, f"is not a multiple of {unit} = seq_len {d.seq_len} x "
            f"sequences_per_micro_batch {d.sequences_per_micro_batch} x dp {dp}", f"the nearest is {nearest}",
        )  # fmt: skip
    if cfg.zero.stage == 0 and cfg.student.dtype == "bfloat16":
        yield Problem(
            "zero.stage", 0, "with student.dtype = bfloat16 keeps no float32 master weights that a checkpoint could hold",
            "use zero.stage=1, which costs no more, or student.dtype=float32",
        )  # fmt: skip
    owned = sorted(set(cfg.zero.extra) & set(OWNED_ZERO_KEYS))
    if owned:
        yield Problem("zero.extra", cfg.zero.extra, f"sets {', '.join(owned)}, which kdtrain decides", "remove them")


def _objective(cfg: RunConfig) -> Iterator[Problem]:
    for section in fields(cfg.objective):
        chosen = getattr(cfg.objective, section.name)
        if section.name in ("name", cfg.objective.name) or chosen == type(chosen)():
            continue
        yield Problem(
            f"objective.{section.name}", "(changed)", f"would be ignored: objective.name = {cfg.objective.name}",
            f"remove the section, or set objective.name={section.name}",
        )  # fmt: skip
    d = cfg.objective.distill
    if cfg.objective.name != "distill":
        return
    key = "objective.distill."
    if not 0 <= d.kd_weight <= 1:
        yield Problem(key + "kd_weight", d.kd_weight, "is not in [0, 1]", "it is a mixing weight, 0.5 mixes evenly")
    if not 0 < d.temperature < math.inf:
        yield Problem(key + "temperature", d.temperature, "is not a positive number", "1 is usual, 2 softens")
    if d.divergence == "jsd" and not 0 < d.teacher_share < 1:
        yield Problem(key + "teacher_share", d.teacher_share, "is not in (0, 1)", "its ends are forward_kl, reverse_kl")
    if d.divergence in ("skew_kl", "skew_reverse_kl") and not 0 < d.skew < 1:
        yield Problem(key + "skew", d.skew, "is not in (0, 1)", "0.1 is usual; 0 is forward_kl or reverse_kl")
    if d.divergence == "alpha_beta" and (d.ab_alpha == 0 or d.ab_beta == 0 or d.ab_alpha + d.ab_beta == 0):
        yield Problem(
            key + "ab_alpha", d.ab_alpha, f"and ab_beta = {d.ab_beta}: neither they nor their sum may be 0",
            "the limits (1, 0) and (0, 1) are forward_kl and reverse_kl",
        )  # fmt: skip


def _optimizer(cfg: RunConfig) -> Iterator[Problem]:
    o = cfg.optim
    if not 0 < o.lr < math.inf:
        yield Problem("optim.lr", o.lr, "is not a positive number", "3e-4 is usual")
    if not all(0 <= beta < 1 for beta in o.betas):
        yield Problem("optim.betas", list(o.betas), "are not both in [0, 1)", "[0.9, 0.95] is usual")
    if not o.eps > 0:
        yield Problem("optim.eps", o.eps, "is not positive", "1e-8 is usual")
    if not o.weight_decay >= 0:
        yield Problem("optim.weight_decay", o.weight_decay, "is negative", "0.1 is usual, 0 switches it off")
    if o.grad_clip is not None and not o.grad_clip > 0:
        yield Problem("optim.grad_clip", o.grad_clip, "is not positive", "1.0 is usual; null switches clipping off")


def _schedule(cfg: RunConfig) -> Iterator[Problem]:
    s, total = cfg.schedule, cfg.train.total_tokens
    if total < cfg.data.tokens_per_step:
        yield Problem(
            "train.total_tokens", total, f"is less than one step (data.tokens_per_step = {cfg.data.tokens_per_step})",
            "train for at least one step",
        )  # fmt: skip
    if not 0 <= s.warmup_tokens <= total:
        yield Problem("schedule.warmup_tokens", s.warmup_tokens, f"is not in [0, {total}]", "1 % of the run is usual")
    if s.decay_tokens is not None and not 0 < s.decay_tokens <= total - s.warmup_tokens:
        yield Problem(
            "schedule.decay_tokens", s.decay_tokens, f"is not in (0, {total - s.warmup_tokens}], what the warm-up leaves",
            "a tenth of train.total_tokens is usual",
        )  # fmt: skip
    if s.decay_tokens is not None and s.shape != "wsd":
        yield Problem(
            "schedule.decay_tokens", s.decay_tokens, f"would be ignored: schedule.shape = {s.shape}",
            "remove it, or set schedule.shape=wsd",
        )  # fmt: skip
    if not 0 <= s.min_lr_ratio <= 1:
        yield Problem("schedule.min_lr_ratio", s.min_lr_ratio, "is not in [0, 1]", "0.1 is usual")


def _cadence(cfg: RunConfig) -> Iterator[Problem]:
    positive: tuple[tuple[str, Any], ...] = (
        ("log.every_steps", cfg.log.every_steps),
        ("eval.every_steps", cfg.eval.every_steps),
        ("eval.max_tokens", cfg.eval.max_tokens),
        ("checkpoint.every_steps", cfg.checkpoint.every_steps),
        ("checkpoint.keep_last", cfg.checkpoint.keep_last),
    )
    for key, value in positive:
        if value is not None and value < 1:
            yield Problem(key, value, "is not positive", "use 1 or more")
    if cfg.data.validation is None and (cfg.eval.every_steps is not None or cfg.eval.max_tokens is not None):
        yield Problem("data.validation", None, "but eval is configured", "name a token store, or remove the section eval")
    if cfg.train.slab_bytes < MIN_SLAB_BYTES:
        yield Problem("train.slab_bytes", cfg.train.slab_bytes, f"is less than {MIN_SLAB_BYTES} bytes", "2**30 is usual")


def missing_paths(cfg: RunConfig) -> Iterator[Problem]:
    """Paths that are not what they should be. Looks at the file system, writes nothing."""
    stores = [("data.train", path) for path in cfg.data.train]
    stores += [("data.validation", cfg.data.validation)] if cfg.data.validation is not None else []
    for key, path in stores:
        yield from _needs(key, path, "manifest.json", "a token store", "make one with launch/prepare_corpus.py")
    for key, path in (("student.weights", cfg.student.weights), ("teacher.weights", cfg.teacher.weights)):
        if path is not None:
            yield from _needs(key, path, "config.json", "a Hugging Face model folder", "download or import the model first")
    if cfg.run.resume not in ("auto", "never") and not Path(cfg.run.resume).exists():
        yield Problem("run.resume", cfg.run.resume, "does not exist", "use auto, never, or the path of a checkpoint")
    folder = _nearest_existing(Path(cfg.run.output_dir).absolute())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield Problem(
            "run.output_dir", cfg.run.output_dir, f"cannot be written: {folder} is "
            f"{'not writable for you' if folder.is_dir() else 'not a folder'}", "choose another folder or its permissions",
        )  # fmt: skip


def _needs(key: str, path: str, file: str, what: str, fix: str) -> Iterator[Problem]:
    if not Path(path).is_dir():
        yield Problem(key, path, "does not exist" if not Path(path).exists() else "is not a folder", fix)
    elif not (Path(path) / file).is_file():
        yield Problem(key, path, f"is not {what}: it has no {file}", fix)


def _nearest_existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


