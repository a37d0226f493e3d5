"""Every reason a configuration cannot run, found before torch is imported and told all at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from kdtrain.config import checks_dedicated, checks_memory, checks_start
from kdtrain.config.checks_checkpoint import checkpoint_problems
from kdtrain.config.checks_context import context_problems
from kdtrain.config.checks_data import data_problems
from kdtrain.config.deepspeed_config import EXTRA_ZERO_KEYS, OWNED_ZERO_KEYS
from kdtrain.config.keys import suggestion_among
from kdtrain.config.load import Loaded
from kdtrain.config.paths import missing_paths
from kdtrain.config.problems import Problem, format_problems
from kdtrain.config.ranks import data_ranks, student_ranks, teacher_ranks
from kdtrain.config.schema import DistillObjective, GuardSection, RunConfig, ScheduleSection
from kdtrain.errors import ConfigError

MIN_SLAB_BYTES, MAX_SLAB_BYTES = 1 << 20, 1 << 40
LEAST_EXPONENT = 0.01
TEMPERATURES = (0.01, 100.0)
"""Beyond them a softmax in float32 is one token, or flat."""
MAX_NAME_LENGTH = 128
MAX_SEED = 2**64 - 1
NAME_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
DIVERGENCE_SETTINGS = {
    "teacher_share": ("jsd",),
    "skew": ("skew_kl", "skew_reverse_kl"),
    "ab_alpha": ("alpha_beta",),
    "ab_beta": ("alpha_beta",),
}
"""Field of objective.distill -> the divergences that read it."""


def check(loaded: Loaded, *, world_size: int) -> None:
    """Raise one ConfigError with everything that is wrong, paths included; return if nothing is."""
    cfg = loaded.config
    found = [*problems(cfg, world_size=world_size), *missing_paths(cfg)]
    if found:
        raise ConfigError(format_problems(found, loaded.origins))


def problems(cfg: RunConfig, *, world_size: int) -> Iterator[Problem]:
    """Problems that need nothing but the values. world_size: ranks that will run, dedicated teachers included."""
    yield from _texts(cfg, "")
    yield from _run(cfg)
    yield from _models(cfg)
    yield from _data(cfg)
    yield from data_problems(cfg.data)
    yield from checks_dedicated.problems(cfg, world_size)
    students = student_ranks(cfg, world_size)
    yield from _layout(cfg, students)
    yield from context_problems(cfg, students)
    yield from _teacher_layout(cfg, students)
    yield from _zero(cfg)
    yield from checks_memory.problems(cfg)
    yield from _objective(cfg)
    yield from _z_loss(cfg)
    if cfg.objective.name == "distill":
        yield from _distill(cfg.objective.distill)
    yield from _optimizer(cfg)
    yield from _schedule(cfg)
    yield from _cadence(cfg)
    yield from checkpoint_problems(cfg.checkpoint)
    yield from checks_start.problems(cfg, world_size)
    yield from _guard(cfg.guard)


def _texts(section: Any, prefix: str) -> Iterator[Problem]:
    """Texts that can be no name and no path, wherever they stand."""
    for field in fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if is_dataclass(value):
            yield from _texts(value, f"{key}.")
            continue
        for text in value if isinstance(value, list) else [value]:
            if text == "":
                yield Problem(key, "''", "is empty", "give it a value, or remove the key")
            elif isinstance(text, str) and not text.isprintable():
                yield Problem(key, repr(text), "holds a control character", "remove it")
            elif isinstance(text, str) and text.startswith("~"):
                yield Problem(key, text, "begins with ~, which only a shell replaces", "write the whole path")


def _run(cfg: RunConfig) -> Iterator[Problem]:
    run = cfg.run
    if run.name and (run.name[0] in "._-" or not NAME_LETTERS.issuperset(run.name) or len(run.name) > MAX_NAME_LENGTH):
        yield Problem(
            "run.name",
            run.name,
            "cannot name a folder and a wandb run",
            f"use at most {MAX_NAME_LENGTH} letters, digits, '.', '_' and '-', a letter or digit first",
        )
    if run.seed < 0:
        yield Problem("run.seed", run.seed, "is negative", "use 0 or more")
    if run.seed > MAX_SEED:
        yield Problem("run.seed", run.seed, f"is larger than {MAX_SEED}, torch's largest seed", "use a smaller number")
    if run.time_limit_s is not None and not 0 < run.time_limit_s < math.inf:
        yield Problem("run.time_limit_s", run.time_limit_s, "is not a positive number", "seconds, or null for no limit")


def _models(cfg: RunConfig) -> Iterator[Problem]:
    weights, architecture = cfg.student.weights, cfg.student.architecture
    if weights is None and architecture is None:
        yield Problem(
            "student.architecture",
            None,
            "and student.weights is null too: there is no student",
            "name an architecture to start from scratch, or a Hugging Face folder as student.weights",
        )
    if weights is not None and architecture is not None:
        yield Problem(
            "student.architecture",
            architecture,
            f"would be ignored: student.weights = {weights}",
            "set one of the two to null: architecture is for a student from scratch",
        )
    if cfg.objective.name == "distill" and cfg.teacher.weights is None:
        yield Problem(
            "teacher.weights",
            None,
            "but objective.name = distill needs a teacher",
            "name a Hugging Face model folder, or set objective.name=pretrain",
        )
    has_teacher = cfg.teacher.weights is not None
    for role, model in (("student", cfg.student), *((("teacher", cfg.teacher),) if has_teacher else ())):
        if model.attention.startswith("flash") and model.dtype == "float32":
            yield Problem(
                f"{role}.attention",
                model.attention,
                f"cannot work on {role}.dtype = float32",
                f"set {role}.dtype=bfloat16, or {role}.attention=auto",
            )


def _data(cfg: RunConfig) -> Iterator[Problem]:
    d = cfg.data
    if not d.train:
        yield Problem("data.train", [], "names no token store", "make one with launch/prepare_corpus.py")
    if d.train_weights is not None and len(d.train_weights) != len(d.train):
        yield Problem(
            "data.train_weights",
            d.train_weights,
            f"gives {len(d.train_weights)} weights for the {len(d.train)} stores of data.train",
            "list as many weights as stores, or null: in proportion to their tokens",
        )
    if d.train_weights is not None and not all(0 < weight < math.inf for weight in d.train_weights):
        yield Problem(
            "data.train_weights", d.train_weights, "are not all positive numbers", "leave a store out to not use it"
        )
    for name, least in (("seq_len", 2), ("tokens_per_step", 1), ("sequences_per_micro_batch", 1), ("prefetch", 0)):
        value = getattr(d, name)
        if value < least:
            yield Problem(f"data.{name}", value, f"is smaller than {least}", f"use {least} or more")


def _layout(cfg: RunConfig, world_size: int) -> Iterator[Problem]:
    tp, d = cfg.parallel.tp, cfg.data
    if tp < 1:
        yield Problem("parallel.tp", tp, "is smaller than 1", "1 means that each rank holds the whole student")
        return
    cp = max(1, cfg.parallel.cp)
    if cfg.parallel.sequence and (tp == 1 or d.seq_len // cp % tp):
        yield Problem(
            "parallel.sequence",
            True,
            f"needs ranks to share the tokens: parallel.tp = {tp}, parallel.cp = {cp}, data.seq_len = {d.seq_len}",
            "set parallel.tp above 1 and data.seq_len to a multiple of tp x cp, or parallel.sequence=false",
        )
    if world_size % tp:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        ranks = "the student's ranks" if teacher_ranks(cfg) else "ranks"
        yield Problem(
            "parallel.tp",
            tp,
            f"does not divide the number of {ranks} ({world_size})",
            f"use one of {divisors}, or start a multiple of {tp} ranks (deepspeed --num_accelerators {tp})",
        )
        return
    dp = data_ranks(cfg, world_size)
    if dp is None:  # said by context_problems
        return
    unit = d.seq_len * d.sequences_per_micro_batch * dp
    if min(d.seq_len, d.sequences_per_micro_batch, d.tokens_per_step) >= 1 and d.tokens_per_step % unit:
        below = d.tokens_per_step // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        yield Problem(
            "data.tokens_per_step",
            d.tokens_per_step,
            f"is not a multiple of {unit} = seq_len {d.seq_len} x "
            f"sequences_per_micro_batch {d.sequences_per_micro_batch} x dp {dp}",
            f"use {near}, or another data.sequences_per_micro_batch",
        )


def _teacher_layout(cfg: RunConfig, world_size: int) -> Iterator[Problem]:
    t, tp = cfg.teacher, cfg.parallel.tp
    if t.weights is None:
        return
    if t.zero_stage not in (0, 3):
        yield Problem(
            "teacher.zero_stage",
            t.zero_stage,
            "is neither 0 nor 3",
            "0 keeps weights on every data rank, 3 divides them; stages 1 and 2 divide what a frozen model has not",
        )
    if t.offload and t.zero_stage != 3:
        yield Problem("teacher.offload", True, "would be ignored: teacher.zero_stage is not 3", "set zero_stage=3 too")
    if t.tp is None or t.layout == "dedicated":
        return
    if t.layout != "tp":
        yield Problem("teacher.tp", t.tp, "would be ignored: teacher.layout = plain", "set teacher.layout=tp, or null")
    elif tp >= 1 and (t.tp < 1 or t.tp % tp):
        yield Problem("teacher.tp", t.tp, f"is no multiple of parallel.tp = {tp}", f"use {tp}, {2 * tp} or {4 * tp}")
    elif world_size % t.tp:
        yield Problem(
            "teacher.tp",
            t.tp,
            f"does not divide the number of ranks ({world_size})",
            f"use a divisor of {world_size}, or start a multiple of {t.tp} ranks",
        )


def _zero(cfg: RunConfig) -> Iterator[Problem]:
    zero = cfg.zero
    if zero.stage == 0 and cfg.student.dtype == "bfloat16":
        yield Problem(
            "zero.stage",
            0,
            "with student.dtype = bfloat16 would keep no float32 master weights",
            "use zero.stage=1, which costs no more memory, or student.dtype=float32",
        )
    for name, value in zero.extra.items():
        key = f"zero.extra.{name}"
        if name in OWNED_ZERO_KEYS:
            yield Problem(key, value, f"is not yours to set: {OWNED_ZERO_KEYS[name]}", "remove it")
        elif name not in EXTRA_ZERO_KEYS:
            meant = suggestion_among(name, EXTRA_ZERO_KEYS)
            fix = f"did you mean {meant}?" if meant else f"known: {', '.join(EXTRA_ZERO_KEYS)}"
            yield Problem(key, value, "is no key of DeepSpeed's zero_optimization that may be set", fix)
        elif EXTRA_ZERO_KEYS[name] == "switch" and not isinstance(value, bool):
            yield Problem(key, value, "is neither true nor false", "write true or false")
        elif (kind := EXTRA_ZERO_KEYS[name]) != "switch" and not (_is_count(value) and (value or kind == "count")):
            above = "" if kind == "count" else " above 0"
            yield Problem(key, value, f"is not a whole number of elements{above}", "write e.g. 500_000_000 or 5e8")


def _is_count(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value >= 0 and math.isfinite(value) and value == int(value)


def _objective(cfg: RunConfig) -> Iterator[Problem]:
    for section in fields(cfg.objective):
        chosen = getattr(cfg.objective, section.name)
        if section.name in ("name", "z_loss", cfg.objective.name):
            continue
        for field, value in _changed(chosen, type(chosen)()):
            yield Problem(
                f"objective.{section.name}.{field}",
                value,
                f"would be ignored: objective.name = {cfg.objective.name}",
                f"remove it, or set objective.name={section.name}",
            )


def _z_loss(cfg: RunConfig) -> Iterator[Problem]:
    if not 0 <= cfg.objective.z_loss < 1:
        yield Problem("objective.z_loss", cfg.objective.z_loss, "is not in [0, 1)", "1e-4 is usual, 0 switches it off")


def _changed(section: Any, defaults: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(section):
        value = getattr(section, field.name)
        if value != getattr(defaults, field.name):
            yield field.name, value


def _distill(d: DistillObjective) -> Iterator[Problem]:
    key = "objective.distill."
    for name, value in _changed(d, DistillObjective()):
        if d.divergence not in DIVERGENCE_SETTINGS.get(name, (d.divergence,)):
            yield Problem(
                key + name,
                value,
                f"would be ignored: {key}divergence = {d.divergence}",
                f"remove it, or use the divergence {' or '.join(DIVERGENCE_SETTINGS[name])}",
            )
    if not 0 <= d.kd_weight <= 1:
        yield Problem(key + "kd_weight", d.kd_weight, "is not in [0, 1]", "it is a mixing weight, 0.5 mixes evenly")
    low, high = TEMPERATURES
    if not low <= d.temperature <= high:
        yield Problem(key + "temperature", d.temperature, f"is not in [{low:g}, {high:g}]", "1 is usual, 2 softens")
    if d.divergence == "jsd" and not 0 < d.teacher_share < 1:
        yield Problem(key + "teacher_share", d.teacher_share, "is not in (0, 1)", "its ends are forward_kl, reverse_kl")
    if d.divergence in ("skew_kl", "skew_reverse_kl") and not 0 < d.skew < 1:
        yield Problem(key + "skew", d.skew, "is not in (0, 1)", "0.1 is usual; at 0 it is forward_kl or reverse_kl")
    if d.divergence != "alpha_beta":
        return
    exponents = (("ab_alpha", d.ab_alpha), ("ab_beta", d.ab_beta))
    for name, value in exponents:
        if not (math.isfinite(value) and abs(value) >= LEAST_EXPONENT):
            yield Problem(
                key + name,
                value,
                f"is not a finite number of at least {LEAST_EXPONENT} in size",
                "the limits (1, 0) and (0, 1) are the two KLs",
            )
    if all(math.isfinite(value) for _, value in exponents) and d.ab_alpha + d.ab_beta <= 0:
        yield Problem(
            key + "ab_beta", d.ab_beta, f"and ab_alpha = {d.ab_alpha} do not add up to more than 0", "0.5, 0.5 works"
        )


def _optimizer(cfg: RunConfig) -> Iterator[Problem]:
    o = cfg.optim
    if not 0 < o.lr < math.inf:
        yield Problem("optim.lr", o.lr, "is not a positive number", "3e-4 is usual")
    if not all(0 <= beta < 1 for beta in o.betas):
        yield Problem("optim.betas", list(o.betas), "are not both in [0, 1)", "[0.9, 0.95] is usual")
    if not 0 < o.eps < 1:
        yield Problem("optim.eps", o.eps, "is not in (0, 1)", "1e-8 is usual")
    if not 0 <= o.weight_decay < math.inf:
        yield Problem("optim.weight_decay", o.weight_decay, "is not 0 or more", "0.1 is usual, 0 switches it off")
    elif o.weight_decay * o.lr >= 1:  # AdamW multiplies weights with 1 - lr * weight_decay
        yield Problem("optim.weight_decay", o.weight_decay, f"times optim.lr = {o.lr} is 1 or more", "0.1 is usual")
    if o.grad_clip is not None and not 0 < o.grad_clip < math.inf:
        yield Problem("optim.grad_clip", o.grad_clip, "is not a positive number", "1.0 is usual, null: no clipping")


def _schedule(cfg: RunConfig) -> Iterator[Problem]:
    s, total = cfg.schedule, cfg.train.total_tokens
    if total < max(1, cfg.data.tokens_per_step):
        yield Problem(
            "train.total_tokens",
            total,
            f"is less than one step (data.tokens_per_step = {cfg.data.tokens_per_step})",
            "train for at least one step",
        )
        return
    if not 0 <= s.warmup_tokens <= total:
        yield Problem(
            "schedule.warmup_tokens",
            s.warmup_tokens,
            f"is not in [0, {total}] (train.total_tokens)",
            "a hundredth of the run is usual",
        )
    elif s.shape == "wsd":
        yield from _decay(s, total)
    if s.decay_tokens is not None and s.shape != "wsd":
        yield Problem(
            "schedule.decay_tokens",
            s.decay_tokens,
            f"would be ignored: schedule.shape = {s.shape}",
            "remove it, or set schedule.shape=wsd",
        )
    if s.shape == "constant" and s.min_lr_ratio != ScheduleSection().min_lr_ratio:
        yield Problem(
            "schedule.min_lr_ratio",
            s.min_lr_ratio,
            "would be ignored: schedule.shape = constant",
            "remove it, or choose a shape that decays",
        )
    if not 0 <= s.min_lr_ratio <= 1:
        yield Problem("schedule.min_lr_ratio", s.min_lr_ratio, "is not in [0, 1]", "0.1 is usual")


def _decay(s: ScheduleSection, total: int) -> Iterator[Problem]:
    left = total - s.warmup_tokens
    if s.decay_tokens is None and total // 10 > left:
        yield Problem(
            "schedule.decay_tokens",
            None,
            f"means {total // 10} tokens, but the warm-up leaves {left}",
            "shorten schedule.warmup_tokens, or set schedule.decay_tokens",
        )
    if s.decay_tokens is not None and not 0 < s.decay_tokens <= left:
        yield Problem(
            "schedule.decay_tokens",
            s.decay_tokens,
            f"is not in (0, {left}], what the warm-up leaves",
            "a tenth of train.total_tokens is usual",
        )


def _cadence(cfg: RunConfig) -> Iterator[Problem]:
    positive: tuple[tuple[str, int | None], ...] = (
        ("log.every_steps", cfg.log.every_steps),
        ("eval.every_steps", cfg.eval.every_steps),
        ("eval.max_tokens", cfg.eval.max_tokens),
        ("checkpoint.every_steps", cfg.checkpoint.every_steps),
        ("checkpoint.keep_last", cfg.checkpoint.keep_last),
    )
    for key, value in positive:
        if value is not None and value < 1:
            yield Problem(key, value, "is smaller than 1", "use 1 or more")
    if cfg.data.validation is None and (cfg.eval.every_steps is not None or cfg.eval.max_tokens is not None):
        yield Problem(
            "data.validation", None, "but the section eval is set", "name a token store, or remove the section eval"
        )
    if not MIN_SLAB_BYTES <= cfg.train.slab_bytes <= MAX_SLAB_BYTES:
        yield Problem(
            "train.slab_bytes",
            cfg.train.slab_bytes,
            f"is not in [{MIN_SLAB_BYTES}, {MAX_SLAB_BYTES}]",
            "1073741824 is usual",
        )
    wandb = cfg.log.wandb
    if set(wandb.project) & set("/\\#?%:") or len(wandb.project) > MAX_NAME_LENGTH:
        yield Problem(
            "log.wandb.project",
            wandb.project,
            "is no name that wandb accepts",
            f"at most {MAX_NAME_LENGTH} characters, none of / \\ # ? % :",
        )
    if wandb.entity is not None and "/" in wandb.entity:
        yield Problem("log.wandb.entity", wandb.entity, "is not one name", "entity and project are two settings")


def _guard(g: GuardSection) -> Iterator[Problem]:
    if g.max_skipped_steps < 0:
        yield Problem("guard.max_skipped_steps", g.max_skipped_steps, "is negative", "0 stops at the first such step")
    for name, value in (
        ("spike_sigmas", g.spike_sigmas),
        ("stall_warn_s", g.stall_warn_s),
        ("stall_exit_s", g.stall_exit_s),
    ):
        if value is not None and not 0 < value < math.inf:
            yield Problem(f"guard.{name}", value, "is not a positive number", "null switches it off")
    if not 0 < g.data_wait_share <= 1:
        yield Problem("guard.data_wait_share", g.data_wait_share, "is not in (0, 1]", "0.1 is usual, 1 never warns")
    if g.stall_exit_s is not None and g.stall_warn_s is None:
        yield Problem(
            "guard.stall_exit_s",
            g.stall_exit_s,
            "would be ignored: guard.stall_warn_s = null, so nobody watches",
            "set guard.stall_warn_s too, or guard.stall_exit_s=null",
        )
    elif g.stall_exit_s is not None and g.stall_warn_s is not None and g.stall_exit_s < g.stall_warn_s:
        yield Problem(
            "guard.stall_exit_s",
            g.stall_exit_s,
            f"is less than guard.stall_warn_s = {g.stall_warn_s}",
            "warn first, exit later",
        )
