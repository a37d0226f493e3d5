import ast
import importlib
import math
import os
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from kdtrain.config import paths, validate
from kdtrain.config.load import Loaded, load_run
from kdtrain.config.problems import Problem, format_problems
from kdtrain.config.schema import DistillObjective, RunConfig
from kdtrain.errors import EXIT_CONFIG, ConfigError
from kdtrain.models.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]

CHECKS = [
    importlib.import_module(f"kdtrain.config.{path.stem}")
    for path in sorted(Path(validate.__file__).parent.glob("checks_*.py"))
]


def runnable(**changes):
    """A configuration without a problem on 4 ranks, then changed: dotted keys with __ for the dots."""
    cfg = RunConfig()
    base = {
        "run__name": "a-1.x_Y",
        "student__architecture": "llama-5m",
        "teacher__weights": "t",
        "data__train": ["a", "b"],
        "data__seq_len": 8,
        "data__sequences_per_micro_batch": 3,
        "data__tokens_per_step": 96,
        "parallel__tp": 2,
        "train__total_tokens": 960,
    }
    for name, value in {**base, **changes}.items():
        *path, leaf = name.split("__")
        section = cfg
        for part in path:
            section = getattr(section, part)
        setattr(section, leaf, value)
    return cfg


def distill(**changes):
    return {f"objective__distill__{name}": value for name, value in changes.items()}


def dedicated(ranks, **changes):
    return {
        "teacher__layout": "dedicated",
        "teacher__ranks": ranks,
        **{f"teacher__{name}": value for name, value in changes.items()},
    }


# (changes to a configuration that runs on 4 ranks, key of the one problem, words of its reason or fix)
CASES = {
    "empty text": ({"run__output_dir": ""}, "run.output_dir", "is empty"),
    "empty item": ({"data__train": ["a", ""]}, "data.train", "is empty"),
    "control character": ({"log__wandb__entity": "a\nb"}, "log.wandb.entity", "holds a control character"),
    "slash in name": ({"run__name": "a/b"}, "run.name", "cannot name a folder"),
    "dots as name": ({"run__name": ".."}, "run.name", "cannot name a folder"),
    "option as name": ({"run__name": "-rf"}, "run.name", "cannot name a folder"),
    "accent in name": ({"run__name": "\xe9"}, "run.name", "cannot name a folder"),
    "long name": ({"run__name": "a" * 129}, "run.name", "at most 128"),
    "seed": ({"run__seed": -1}, "run.seed", "is negative"),
    "seed beyond torch's": ({"run__seed": 2**64}, "run.seed", "is larger than 18446744073709551615"),
    "time limit": ({"run__time_limit_s": 0.0}, "run.time_limit_s", "is not a positive number"),
    "time limit nan": ({"run__time_limit_s": math.nan}, "run.time_limit_s", "is not a positive number"),
    "no student": ({"student__architecture": None}, "student.architecture", "there is no student"),
    "two students": ({"student__weights": "w"}, "student.architecture", "would be ignored: student.weights = w"),
    "no teacher": ({"teacher__weights": None}, "teacher.weights", "objective.name = distill needs a teacher"),
    "flash in fp32": (
        {"student__attention": "flash_attention_2", "student__dtype": "float32"},
        "student.attention",
        "cannot work on student.dtype = float32",
    ),
    "flash teacher in fp32": (
        {"teacher__attention": "flash_attention_3", "teacher__dtype": "float32"},
        "teacher.attention",
        "cannot work on teacher.dtype = float32",
    ),
    "no data": ({"data__train": []}, "data.train", "names no token store"),
    "number of weights": ({"data__train_weights": [1.0]}, "data.train_weights", "gives 1 weights for the 2 stores"),
    "zero weight": ({"data__train_weights": [1.0, 0.0]}, "data.train_weights", "are not all positive"),
    "infinite weight": ({"data__train_weights": [1.0, math.inf]}, "data.train_weights", "are not all positive"),
    "nan weight": ({"data__train_weights": [1.0, math.nan]}, "data.train_weights", "are not all positive"),
    "seq_len": ({"data__seq_len": 1}, "data.seq_len", "is smaller than 2"),
    "micro-batch": ({"data__sequences_per_micro_batch": 0}, "data.sequences_per_micro_batch", "is smaller than 1"),
    "tokens_per_step": ({"data__tokens_per_step": 0}, "data.tokens_per_step", "is smaller than 1"),
    "prefetch": ({"data__prefetch": -1}, "data.prefetch", "is smaller than 0"),
    "prefetch beyond all": ({"data__prefetch": 10**12}, "data.prefetch", "is larger than 1024 steps"),
    "switch of auto": ({"data__allow_worse_prefix": True}, "data.allow_worse_prefix", "sequence_prefix = auto takes"),
    "home folder": ({"run__output_dir": "~/runs"}, "run.output_dir", "which only a shell replaces"),
    "tp 0": ({"parallel__tp": 0}, "parallel.tp", "is smaller than 1"),
    "sequence at tp 1": ({"parallel__tp": 1, "parallel__sequence": True}, "parallel.sequence", "parallel.tp = 1,"),
    "sequence of odd length": (
        {"parallel__sequence": True, "data__seq_len": 3, "data__tokens_per_step": 90},
        "parallel.sequence",
        "data.seq_len = 3",
    ),
    "tp 3": ({"parallel__tp": 3}, "parallel.tp", r"does not divide the number of ranks (4)"),
    "tp 8": ({"parallel__tp": 8}, "parallel.tp", r"use one of [1, 2, 4]"),
    "tokens not a multiple": ({"data__tokens_per_step": 100}, "data.tokens_per_step", "use 96 or 144"),
    "tokens below a micro-batch": (
        {"data__tokens_per_step": 40},
        "data.tokens_per_step",
        "multiple of 48 = seq_len 8 x sequences_per_micro_batch 3 x dp 2\n      fix: use 48, or",
    ),
    "teacher's stage": ({"teacher__zero_stage": 1}, "teacher.zero_stage", "is neither 0 nor 3"),
    "optimizer offload at stage 0": (
        {"zero__stage": 0, "student__dtype": "float32", "zero__offload_optimizer": True},
        "zero.offload_optimizer",
        "would be ignored: zero.stage = 0",
    ),
    "teacher's tokens": (
        {"teacher__max_tokens_per_forward": 7},
        "teacher.max_tokens_per_forward",
        "is less than one sequence",
    ),
    "overlap without a teacher's step": (
        {"objective__name": "pretrain", "teacher__overlap": True},
        "teacher.overlap",
        "objective.name = pretrain",
    ),
    "nothing to quantise": (
        {"objective__name": "pretrain", "teacher__weights": None, "teacher__quantize": "int8"},
        "teacher.quantize",
        "would be ignored: teacher.weights = null",
    ),
    **{
        f"{name} of no teacher": (
            {"objective__name": "pretrain", "teacher__weights": None, f"teacher__{name}": value},
            f"teacher.{name}",
            f"would be ignored: teacher.weights = null\n      fix: set teacher.weights, or teacher.{name}={default}",
        )
        for name, value, default in (
            ("layout", "dedicated", "plain"),
            ("tp", 2, "null"),
            ("ranks", 2, "null"),
            ("zero_stage", 3, "0"),
            ("offload", True, "false"),
            ("overlap", True, "false"),
            ("max_tokens_per_forward", 64, "null"),
        )
    },
    "quantised in pieces": (
        {"teacher__quantize": "int8", "teacher__zero_stage": 3},
        "teacher.quantize",
        "divides ordinary weights only",
    ),
    "quantised on ranks of its own": (
        {"teacher__layout": "dedicated", "teacher__ranks": 2, "teacher__quantize": "fp8", "data__tokens_per_step": 24},
        "teacher.quantize",
        "measured where the head is",
    ),
    "overlap with ZeRO-3": (
        {"teacher__zero_stage": 3, "teacher__overlap": True},
        "teacher.overlap",
        "a whole step runs ahead",
    ),
    "offload alone": ({"teacher__offload": True}, "teacher.offload", "would be ignored: teacher.zero_stage is not 3"),
    "teacher's tp alone": ({"teacher__tp": 4}, "teacher.tp", "would be ignored: teacher.layout = plain"),
    "teacher's tp no multiple": (
        {"teacher__tp": 3, "teacher__layout": "tp"},
        "teacher.tp",
        "is no multiple of parallel.tp = 2",
    ),
    "teacher's tp 0": ({"teacher__tp": 0, "teacher__layout": "tp"}, "teacher.tp", "use 2, 4 or 8"),
    "teacher's tp 8": ({"teacher__tp": 8, "teacher__layout": "tp"}, "teacher.tp", "does not divide the number"),
    "cp 0": ({"parallel__cp": 0}, "parallel.cp", "is smaller than 1"),
    "cp 4": ({"parallel__cp": 4}, "parallel.cp", "times parallel.tp = 2 does not divide the number of ranks (4)"),
    "cp of an odd length": (
        {"parallel__cp": 2, "data__seq_len": 3, "data__tokens_per_step": 90},
        "data.seq_len",
        "is not a multiple of parallel.cp = 2",
    ),
    "cp beside a teacher cut further": (
        {"parallel__cp": 2, "teacher__layout": "tp", "teacher__tp": 4},
        "teacher.tp",
        "differs from parallel.tp = 2",
    ),
    "cp beside a teacher elsewhere": (
        {**dedicated(2), "parallel__tp": 1, "parallel__cp": 2},
        "teacher.layout",
        "is asked for whole sequences",
    ),
    "ranks alone": ({"teacher__ranks": 2}, "teacher.ranks", "would be ignored: teacher.layout = plain"),
    "in_flight alone": ({"teacher__in_flight": 2}, "teacher.in_flight", "would be ignored: teacher.layout = plain"),
    "no number of ranks": ({"teacher__layout": "dedicated"}, "teacher.ranks", "needs a number of ranks"),
    "no teacher's rank": (dedicated(0), "teacher.ranks", "is smaller than 1"),
    "no student's rank": (
        {**dedicated(4), "parallel__tp": 1},
        "teacher.ranks",
        "leaves no rank for the student: the job has 4",
    ),
    "dedicated tp": (
        dedicated(2, tp=3),
        "teacher.tp",
        "does not divide teacher.ranks = 2\n      fix: use one of [1, 2]",
    ),
    "dedicated tp 0": (dedicated(2, tp=0), "teacher.tp", "does not divide teacher.ranks = 2"),
    "dedicated in pieces": (dedicated(2, zero_stage=3), "teacher.zero_stage", "must all run at once"),
    "dedicated overlap": (dedicated(2, overlap=True), "teacher.overlap", "always works ahead"),
    "nothing in flight": (dedicated(2, in_flight=0), "teacher.in_flight", "is not in [1, 1024]"),
    "idle teacher": (
        {**dedicated(2), "objective__name": "pretrain"},
        "teacher.layout",
        "asks the teacher only while it evaluates",
    ),
    "student's tp beside teachers": (
        dedicated(1),
        "parallel.tp",
        "does not divide the number of the student's ranks (3)\n      fix: use one of",
    ),
    "stage 0 in bf16": ({"zero__stage": 0}, "zero.stage", "keep no float32 master weights"),
    "owned zero key": ({"zero__extra": {"stage": 1}}, "zero.extra.stage", "is not yours to set: it is zero.stage"),
    "unknown zero key": (
        {"zero__extra": {"reduce_bucketsize": 1}},
        "zero.extra.reduce_bucketsize",
        "did you mean reduce_bucket_size?",
    ),
    "alien zero key": ({"zero__extra": {"xyz": 1}}, "zero.extra.xyz", "known: reduce_bucket_size, "),
    "zero switch": ({"zero__extra": {"reduce_scatter": 1}}, "zero.extra.reduce_scatter", "neither true nor false"),
    "zero count": (
        {"zero__extra": {"sub_group_size": 0.5}},
        "zero.extra.sub_group_size",
        "is not a whole number of elements",
    ),
    "zero bucket of nothing": (
        {"zero__extra": {"reduce_bucket_size": 0}},
        "zero.extra.reduce_bucket_size",
        "number of elements above 0",
    ),
    "zero count bool": ({"zero__extra": {"sub_group_size": True}}, "zero.extra.sub_group_size", "whole number"),
    "zero count nan": ({"zero__extra": {"sub_group_size": math.nan}}, "zero.extra.sub_group_size", "whole number"),
    "other objective": (
        {"objective__name": "pretrain", **distill(kd_weight=0.9)},
        "objective.distill.kd_weight",
        "would be ignored: objective.name = pretrain",
    ),
    "skew without use": (distill(skew=0.2), "objective.distill.skew", "or use the divergence skew_kl or skew_reverse"),
    "share without use": (
        distill(divergence="skew_kl", teacher_share=0.2),
        "objective.distill.teacher_share",
        "would be ignored: objective.distill.divergence = skew_kl",
    ),
    "exponent without use": (distill(ab_beta=0.2), "objective.distill.ab_beta", "use the divergence alpha_beta"),
    "kd_weight": (distill(kd_weight=1.5), "objective.distill.kd_weight", "is not in [0, 1]"),
    "kd_weight nan": (distill(kd_weight=math.nan), "objective.distill.kd_weight", "is not in [0, 1]"),
    "temperature": (distill(temperature=0.0), "objective.distill.temperature", "is not in [0.01, 100]"),
    "temperature inf": (distill(temperature=math.inf), "objective.distill.temperature", "is not in [0.01, 100]"),
    "temperature nan": (distill(temperature=math.nan), "objective.distill.temperature", "is not in [0.01, 100]"),
    "teacher_share": (distill(divergence="jsd", teacher_share=1.0), "objective.distill.teacher_share", "in (0, 1)"),
    "skew": (distill(divergence="skew_reverse_kl", skew=0.0), "objective.distill.skew", "is not in (0, 1)"),
    "alpha": (distill(divergence="alpha_beta", ab_alpha=0.0), "objective.distill.ab_alpha", "of at least 0.01 in size"),
    "beta": (distill(divergence="alpha_beta", ab_beta=math.inf), "objective.distill.ab_beta", "is not a finite number"),
    "alpha + beta": (distill(divergence="alpha_beta", ab_beta=-0.5), "objective.distill.ab_beta", "do not add up to"),
    "alpha + beta < 0": (distill(divergence="alpha_beta", ab_beta=-1.0), "objective.distill.ab_beta", "more than 0"),
    "z-loss": ({"objective__z_loss": -1e-4}, "objective.z_loss", "is not in [0, 1)"),
    "z-loss nan": ({"objective__z_loss": math.nan}, "objective.z_loss", "is not in [0, 1)"),
    "lr": ({"optim__lr": 0.0}, "optim.lr", "is not a positive number"),
    "lr nan": ({"optim__lr": math.nan}, "optim.lr", "is not a positive number"),
    "betas": ({"optim__betas": (0.9, 1.0)}, "optim.betas", "are not both in [0, 1)"),
    "eps": ({"optim__eps": 0.0}, "optim.eps", "is not in (0, 1)"),
    "weight decay": ({"optim__weight_decay": -0.1}, "optim.weight_decay", "is not 0 or more"),
    "decay beyond all": ({"optim__weight_decay": 1e4}, "optim.weight_decay", "times optim.lr = 0.0003 is 1 or more"),
    "grad clip": ({"optim__grad_clip": 0.0}, "optim.grad_clip", "null: no clipping"),
    "total tokens": ({"train__total_tokens": 95}, "train.total_tokens", "is less than one step"),
    "warm-up": ({"schedule__warmup_tokens": 961}, "schedule.warmup_tokens", "is not in [0, 960]"),
    "negative warm-up": ({"schedule__warmup_tokens": -1}, "schedule.warmup_tokens", "is not in [0, 960]"),
    "default decay": (
        {"schedule__shape": "wsd", "schedule__warmup_tokens": 900},
        "schedule.decay_tokens",
        "means 96 tokens, but the warm-up leaves 60",
    ),
    "decay": (
        {"schedule__shape": "wsd", "schedule__warmup_tokens": 900, "schedule__decay_tokens": 61},
        "schedule.decay_tokens",
        "is not in (0, 60]",
    ),
    "decay without use": ({"schedule__decay_tokens": 96}, "schedule.decay_tokens", "ignored: schedule.shape = cosine"),
    "floor without use": (
        {"schedule__shape": "constant", "schedule__min_lr_ratio": 0.2},
        "schedule.min_lr_ratio",
        "would be ignored: schedule.shape = constant",
    ),
    "floor": ({"schedule__min_lr_ratio": 1.1}, "schedule.min_lr_ratio", "is not in [0, 1]"),
    "log": ({"log__every_steps": 0}, "log.every_steps", "is smaller than 1"),
    "save": ({"checkpoint__every_steps": 0}, "checkpoint.every_steps", "is smaller than 1"),
    "keep": ({"checkpoint__keep_last": 0}, "checkpoint.keep_last", "is smaller than 1"),
    "keep every": (
        {"checkpoint__keep_every": 0, "checkpoint__every_steps": 2},
        "checkpoint.keep_every",
        "is smaller than 1",
    ),
    "keep every of none": ({"checkpoint__keep_every": 4}, "checkpoint.keep_every", "would be ignored"),
    "keep every between": (
        {"checkpoint__keep_every": 5, "checkpoint__every_steps": 2},
        "checkpoint.keep_every",
        "is no multiple of",
    ),
    "other number of ranks": ({"parallel__world_size": 16}, "parallel.world_size", "expected, and 4 were started"),
    "no ranks": ({"parallel__world_size": 0}, "parallel.world_size", "is smaller than 1"),
    "two beginnings": (
        {"run__continue_from": "a", "run__resume": "b"},
        "run.continue_from",
        "while run.resume = b: a run begins at",
    ),
    "lease": ({"run__lock_lease_s": 0.0}, "run.lock_lease_s", "is not a positive number"),
    "async at the end": ({"checkpoint__async_write": True}, "checkpoint.async_write", "would change nothing"),
    "eval": ({"data__validation": "v", "eval__every_steps": 0}, "eval.every_steps", "is smaller than 1"),
    "eval tokens": ({"data__validation": "v", "eval__max_tokens": 0}, "eval.max_tokens", "is smaller than 1"),
    "eval without data": ({"eval__every_steps": 5}, "data.validation", "but the section eval is set"),
    "slab": ({"train__slab_bytes": 1000}, "train.slab_bytes", "is not in [1048576, 1099511627776]"),
    "slab beyond all": ({"train__slab_bytes": 10**20}, "train.slab_bytes", "is not in [1048576, "),
    "wandb project": ({"log__wandb__project": "a/b"}, "log.wandb.project", "is no name that wandb accepts"),
    "wandb entity": ({"log__wandb__entity": "a/b"}, "log.wandb.entity", "is not one name"),
    "skipped steps": ({"guard__max_skipped_steps": -1}, "guard.max_skipped_steps", "is negative"),
    "sigmas": ({"guard__spike_sigmas": 0.0}, "guard.spike_sigmas", "is not a positive number"),
    "stall nan": ({"guard__stall_warn_s": math.nan}, "guard.stall_warn_s", "null switches it off"),
    "stall exit inf": ({"guard__stall_exit_s": math.inf}, "guard.stall_exit_s", "is not a positive number"),
    "wait share": ({"guard__data_wait_share": 0.0}, "guard.data_wait_share", "is not in (0, 1]"),
    "exit before the warning": ({"guard__stall_exit_s": 299.0}, "guard.stall_exit_s", "less than guard.stall_warn_s"),
    "exit that nobody watches for": (
        {"guard__stall_warn_s": None, "guard__stall_exit_s": 9.0},
        "guard.stall_exit_s",
        "so nobody watches",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_mistake_is_one_problem_that_says_why_and_how_to_mend_it(case):
    changes, key, words = CASES[case]
    found = list(validate.problems(runnable(**changes), world_size=4))
    assert [problem.key for problem in found] == [key]
    text = format_problems(found, {key: "x.yaml:7"})
    assert text.startswith(f"1 problem in this run's configuration\n\n  {key} = ")
    assert "    [x.yaml:7]\n      " in text
    assert words in text
    assert found[0].fix


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel__tp": 4, "data__tokens_per_step": 24},
        {"objective__name": "pretrain", "teacher__weights": None},
        {
            "objective__name": "pretrain",
            "teacher__weights": None,
            "teacher__attention": "flash_attention_2",
            "teacher__dtype": "float32",
        },
        {"student__weights": "w", "student__architecture": None},
        {"zero__stage": 0, "student__dtype": "float32"},
        {"teacher__layout": "tp", "teacher__tp": 4, "teacher__zero_stage": 3, "teacher__offload": True},
        {
            "teacher__layout": "dedicated",
            "teacher__ranks": 2,
            "teacher__tp": 2,
            "teacher__in_flight": 1,
            "teacher__max_tokens_per_forward": 8,
        },
        {"teacher__layout": "dedicated", "teacher__ranks": 3, "parallel__tp": 1},
        {"teacher__overlap": True, "teacher__max_tokens_per_forward": 8, "zero__offload_optimizer": True},
        {"run__seed": 2**64 - 1},
        {"zero__extra": {"reduce_bucket_size": 5e8, "sub_group_size": 7, "reduce_scatter": False}},
        {"data__train_weights": [1e-9, 5.0], "data__validation": "v", "eval__every_steps": 1, "eval__max_tokens": 1},
        {"schedule__shape": "wsd", "schedule__decay_tokens": 960},
        {"schedule__shape": "constant", "schedule__warmup_tokens": 960},
        {"train__total_tokens": 97, "optim__grad_clip": None, "optim__betas": (0.0, 0.0), "optim__weight_decay": 0.0},
        {"guard__spike_sigmas": None, "guard__stall_warn_s": None, "guard__data_wait_share": 1.0},
        {"guard__max_skipped_steps": 3, "guard__stall_exit_s": 300.0},
        distill(kd_weight=0.0),
        distill(kd_weight=1.0, divergence="jsd", teacher_share=0.9),
        distill(divergence="alpha_beta", ab_alpha=-0.5, ab_beta=1.5),
    ],
)
def test_what_can_run_has_no_problem(changes):
    assert list(validate.problems(runnable(**changes), world_size=4)) == []


def test_all_problems_are_found_at_once():
    cfg = runnable(run__seed=-1, parallel__tp=3, optim__lr=-1.0, teacher__weights=None, log__every_steps=0)
    keys = {problem.key for problem in validate.problems(cfg, world_size=4)}
    assert keys == {"run.seed", "parallel.tp", "optim.lr", "teacher.weights", "log.every_steps"}


def path_cases(tmp_path):
    """(configuration, key of its problem, words)"""
    store, model, empty, file = (tmp_path / name for name in ("store", "model", "empty", "file"))
    for folder, content in ((store, "manifest.json"), (model, "config.json"), (empty, None)):
        folder.mkdir(exist_ok=True)
        if content:
            (folder / content).write_text("{}")
    file.write_text("")
    good = {
        "data__train": [str(store)],
        "data__validation": str(store),
        "teacher__weights": str(model),
        "run__output_dir": str(tmp_path / "new" / "runs"),
    }
    changes = [
        ({}, None, ""),
        ({"run__resume": str(store)}, None, ""),
        ({"data__train": [str(store), "nowhere"]}, "data.train", f"does not exist (looked in {tmp_path})"),
        ({"data__validation": str(tmp_path / "no")}, "data.validation", "does not exist\n"),
        ({"data__train": [str(empty)]}, "data.train", "is not a token store: it has no manifest.json"),
        ({"teacher__weights": str(file)}, "teacher.weights", "is not a Hugging Face model folder"),
        ({"teacher__weights": "org/model"}, "teacher.weights", "hub names are not resolved"),
        ({"student__weights": str(empty)}, "student.weights", "it has no config.json"),
        ({"run__resume": str(tmp_path / "no")}, "run.resume", "does not exist"),
        ({"run__continue_from": str(tmp_path / "no")}, "run.continue_from", "does not exist"),
        ({"run__output_dir": str(file / "runs")}, "run.output_dir", f"{file} is not a folder"),
        ({"student__architecture": str(tmp_path / "no")}, "student.architecture", "does not exist"),
    ]
    return [(runnable(**{**good, **change}), key, words) for change, key, words in changes]


def test_paths_that_are_not_what_they_should_be_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for cfg, key, words in path_cases(tmp_path):
        found = list(paths.missing_paths(cfg))
        assert [problem.key for problem in found] == ([key] if key else [])
        assert words in format_problems(found, {})
    assert not (tmp_path / "new").exists(), "looking must not create anything"


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    cfg = path_cases(tmp_path)[0][0]
    (tmp_path / "locked").mkdir(mode=0o500)
    cfg.run.output_dir = str(tmp_path / "locked" / "runs")
    if os.geteuid() == 0:  # root may write anywhere
        monkeypatch.setattr(paths.os, "access", lambda path, mode: Path(path) != tmp_path / "locked")
    (found,) = paths.missing_paths(cfg)
    assert found.key == "run.output_dir"
    assert f"you have no permission in {tmp_path / 'locked'}" in found.why


def test_check_raises_one_error_with_values_and_paths_and_exit_code_2(tmp_path):
    cfg = runnable(optim__lr=-1.0, run__output_dir=str(tmp_path), data__train=["nowhere"])
    with pytest.raises(ConfigError) as caught:
        validate.check(Loaded(cfg, {"optim.lr": "command line"}), world_size=4)
    assert caught.value.exit_code == EXIT_CONFIG == 2
    text = str(caught.value)
    assert text.startswith("3 problems in this run's configuration\n\n  optim.lr = -1.0    [command line]\n")
    assert "data.train = nowhere    [default]" in text
    assert "teacher.weights = t    [default]" in text


def test_a_runnable_configuration_passes_the_check(tmp_path):
    validate.check(Loaded(path_cases(tmp_path)[0][0], {}), world_size=4)


@pytest.mark.parametrize("module", [validate, paths, *CHECKS], ids=lambda module: module.__name__)
def test_every_problem_of_the_module_is_produced_by_a_case(module, tmp_path, monkeypatch):
    source = Path(module.__file__).read_text(encoding="utf-8")
    calls = [
        range(node.lineno, node.end_lineno + 1)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem"
    ]
    seen = set()

    def recording(*arguments):
        seen.add(sys._getframe(1).f_lineno)
        return Problem(*arguments)

    monkeypatch.setattr(module, "Problem", recording)
    monkeypatch.chdir(tmp_path)
    for changes, _, _ in CASES.values():
        list(validate.problems(runnable(**changes), world_size=4))
    for cfg, _, _ in path_cases(tmp_path):
        list(paths.missing_paths(cfg))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    list(paths.missing_paths(runnable()))
    assert calls
    assert not [span for span in calls if not seen & set(span)], "a message that no test has seen"


def test_the_settings_that_depend_on_the_divergence_exist():
    assert set(validate.DIVERGENCE_SETTINGS) <= {field.name for field in fields(DistillObjective)}


def declared():
    """(file, world size in its header) of every configuration that says how many ranks it is for."""
    found = []
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        size = re.search(r"^# world_size: (\d+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if size:
            found.append(pytest.param(path, int(size[1]), id=str(path.relative_to(ROOT / "configs"))))
    return found


def test_there_are_configurations_to_check():
    assert len(declared()) >= 3
    headless = [path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("base",)]
    assert len(headless) == len(declared()), "a configuration outside configs/base says no world_size"


@pytest.mark.parametrize(("path", "world_size"), declared())
def test_every_configuration_loads_and_is_valid_at_its_world_size(path, world_size, monkeypatch):
    for name in re.findall(r"\$\{oc\.env:(\w+)", path.read_text(encoding="utf-8")):
        monkeypatch.setenv(name, "/somewhere")
    loaded = load_run([str(path)])
    assert list(validate.problems(loaded.config, world_size=world_size)) == []
    assert loaded.config.student.architecture is None or loaded.config.student.architecture in ARCHITECTURES


def test_the_shared_defaults_are_valid_with_what_a_run_adds(tmp_path):
    for path in (ROOT / "configs" / "base").glob("*.yaml"):
        run = tmp_path / "run.yaml"
        run.write_text(
            f"extends: {path}\nrun: {{name: a}}\nstudent: {{architecture: llama-5m}}\nteacher: {{weights: t}}\n"
            "data: {train: [a], validation: b}\ntrain: {total_tokens: 10_000_000_000}\n"
        )
        assert list(validate.problems(load_run([str(run)]).config, world_size=8)) == []
