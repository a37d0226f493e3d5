"""Configurations with one mistake in objective, optimizer, length or reports, by the module of the check."""

from __future__ import annotations

import math

from tests.support.config_cases import Case, distill

CASES: dict[str, dict[str, Case]] = {
    "objective": {
        "other objective": (
            {"objective__name": "pretrain", **distill(kd_weight=0.9)},
            "objective.distill.kd_weight",
            "would be ignored: objective.name = pretrain",
        ),
        "skew of another divergence": (
            distill(skew=0.2),
            "objective.distill.skew",
            "or use the divergence skew_kl or skew_reverse",
        ),
        "teacher_share of another divergence": (
            distill(divergence="skew_kl", teacher_share=0.2),
            "objective.distill.teacher_share",
            "would be ignored: objective.distill.divergence = skew_kl",
        ),
        "exponent of another divergence": (
            distill(ab_beta=0.2),
            "objective.distill.ab_beta",
            "use the divergence alpha_beta",
        ),
        "kd_weight": (distill(kd_weight=1.5), "objective.distill.kd_weight", "is not in [0, 1]"),
        "kd_weight nan": (distill(kd_weight=math.nan), "objective.distill.kd_weight", "is not in [0, 1]"),
        "temperature": (distill(temperature=0.0), "objective.distill.temperature", "is not in [0.01, 100]"),
        "temperature inf": (distill(temperature=math.inf), "objective.distill.temperature", "is not in [0.01, 100]"),
        "temperature nan": (distill(temperature=math.nan), "objective.distill.temperature", "is not in [0.01, 100]"),
        "teacher_share": (distill(divergence="jsd", teacher_share=1.0), "objective.distill.teacher_share", "in (0, 1)"),
        "skew": (distill(divergence="skew_reverse_kl", skew=0.0), "objective.distill.skew", "is not in (0, 1)"),
        "alpha": (
            distill(divergence="alpha_beta", ab_alpha=0.0),
            "objective.distill.ab_alpha",
            "of at least 0.01 in size",
        ),
        "beta": (
            distill(divergence="alpha_beta", ab_beta=math.inf),
            "objective.distill.ab_beta",
            "is not a finite number",
        ),
        "exponents add up to 0": (
            distill(divergence="alpha_beta", ab_beta=-0.5),
            "objective.distill.ab_beta",
            "do not add up to",
        ),
        "exponents add up to less than 0": (
            distill(divergence="alpha_beta", ab_beta=-1.0),
            "objective.distill.ab_beta",
            "more than 0",
        ),
        "z-loss": ({"objective__z_loss": -1e-4}, "objective.z_loss", "is not in [0, 1)"),
        "z-loss nan": ({"objective__z_loss": math.nan}, "objective.z_loss", "is not in [0, 1)"),
    },
    "optim": {
        "lr": ({"optim__lr": 0.0}, "optim.lr", "is not a positive number"),
        "lr nan": ({"optim__lr": math.nan}, "optim.lr", "is not a positive number"),
        "betas": ({"optim__betas": (0.9, 1.0)}, "optim.betas", "are not both in [0, 1)"),
        "eps": ({"optim__eps": 0.0}, "optim.eps", "is not in (0, 1)"),
        "weight decay": ({"optim__weight_decay": -0.1}, "optim.weight_decay", "is not 0 or more"),
        "weight decay too large": (
            {"optim__weight_decay": 1e4},
            "optim.weight_decay",
            "times optim.lr = 0.0003 is 1 or more",
        ),
        "grad clip": ({"optim__grad_clip": 0.0}, "optim.grad_clip", "null: no clipping"),
    },
    "train": {
        "total tokens": ({"train__total_tokens": 95}, "train.total_tokens", "is less than one step"),
        "slab too small": ({"train__slab_bytes": 1000}, "train.slab_bytes", "is not in [1048576, 1099511627776]"),
        "slab too large": ({"train__slab_bytes": 10**20}, "train.slab_bytes", "is not in [1048576, "),
    },
    "schedule": {
        "warm-up": ({"schedule__warmup_tokens": 961}, "schedule.warmup_tokens", "is not in [0, 960]"),
        "negative warm-up": ({"schedule__warmup_tokens": -1}, "schedule.warmup_tokens", "is not in [0, 960]"),
        "default decay longer than the rest": (
            {"schedule__shape": "wsd", "schedule__warmup_tokens": 900},
            "schedule.decay_tokens",
            "means 96 tokens, but the warm-up leaves 60",
        ),
        "decay longer than the rest": (
            {"schedule__shape": "wsd", "schedule__warmup_tokens": 900, "schedule__decay_tokens": 61},
            "schedule.decay_tokens",
            "is not in (0, 60]",
        ),
        "decay of another shape": (
            {"schedule__decay_tokens": 96},
            "schedule.decay_tokens",
            "ignored: schedule.shape = cosine",
        ),
        "min_lr_ratio of a constant": (
            {"schedule__shape": "constant", "schedule__min_lr_ratio": 0.2},
            "schedule.min_lr_ratio",
            "would be ignored: schedule.shape = constant",
        ),
        "min_lr_ratio": ({"schedule__min_lr_ratio": 1.1}, "schedule.min_lr_ratio", "is not in [0, 1]"),
    },
    "checkpoint": {
        "every_steps": ({"checkpoint__every_steps": 0}, "checkpoint.every_steps", "is smaller than 1"),
        "keep_last": ({"checkpoint__keep_last": 0}, "checkpoint.keep_last", "is smaller than 1"),
        "keep_every 0": (
            {"checkpoint__keep_every": 0, "checkpoint__every_steps": 2},
            "checkpoint.keep_every",
            "is smaller than 1",
        ),
        "keep_every without every_steps": ({"checkpoint__keep_every": 4}, "checkpoint.keep_every", "would be ignored"),
        "keep_every no multiple": (
            {"checkpoint__keep_every": 5, "checkpoint__every_steps": 2},
            "checkpoint.keep_every",
            "is not a multiple of",
        ),
        "async_write without every_steps": (
            {"checkpoint__async_write": True},
            "checkpoint.async_write",
            "would change nothing",
        ),
    },
    "eval": {
        "every_steps": ({"data__validation": "v", "eval__every_steps": 0}, "eval.every_steps", "is smaller than 1"),
        "max_tokens": ({"data__validation": "v", "eval__max_tokens": 0}, "eval.max_tokens", "is smaller than 1"),
        "no validation store": ({"eval__every_steps": 5}, "data.validation", "but the section eval is set"),
    },
    "log": {
        "every_steps": ({"log__every_steps": 0}, "log.every_steps", "is smaller than 1"),
        "wandb project": ({"log__wandb__project": "a/b"}, "log.wandb.project", "is not a name that wandb accepts"),
        "wandb entity": ({"log__wandb__entity": "a/b"}, "log.wandb.entity", "is not a single name"),
    },
    "guard": {
        "skipped steps": ({"guard__max_skipped_steps": -1}, "guard.max_skipped_steps", "is negative"),
        "spike_sigmas": ({"guard__spike_sigmas": 0.0}, "guard.spike_sigmas", "is not a positive number"),
        "stall nan": ({"guard__stall_warn_s": math.nan}, "guard.stall_warn_s", "null switches it off"),
        "stall exit inf": ({"guard__stall_exit_s": math.inf}, "guard.stall_exit_s", "is not a positive number"),
        "wait share": ({"guard__data_wait_share": 0.0}, "guard.data_wait_share", "is not in (0, 1]"),
        "stall exit before the warning": (
            {"guard__stall_exit_s": 299.0},
            "guard.stall_exit_s",
            "less than guard.stall_warn_s",
        ),
        "stall exit without a warning": (
            {"guard__stall_warn_s": None, "guard__stall_exit_s": 9.0},
            "guard.stall_exit_s",
            "switches the watch off",
        ),
    },
}
