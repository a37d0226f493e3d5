"""Differences between the configuration of a checkpoint and that of the run that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LAYOUT_ONLY = (
    *("run", "parallel", "zero", "log", "eval", "checkpoint", "debug"),
    *("guard.spike_sigmas", "guard.stall_warn_s", "guard.stall_exit_s", "guard.data_wait_share"),
    *(
        "student.attention",
        "student.activation_checkpointing",
        "student.allow_unused_weights",
        "teacher.attention",
        "teacher.allow_unused_weights",
        "teacher.layout",
        "teacher.tp",
        "teacher.ranks",
        "teacher.in_flight",
        "teacher.zero_stage",
        "teacher.offload",
        "teacher.max_tokens_per_forward",
        "teacher.overlap",
    ),
    *("data.sequences_per_micro_batch", "data.prefetch", "data.validation", "train.slab_bytes", "train.kernels"),
    *("data.sequence_prefix", "data.allow_worse_prefix", "data.train", "data.train_weights"),
)
"""Sections and keys that change the layout and speed of a run, but not its result beyond rounding.

The keys of the sequence prefix are among them: a resumed run has that of its checkpoint, or the loader refuses it. So
are the stores and their weights, which the loader compares by fingerprint: neither their paths nor their order matter.
"""


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines "key: old -> new" of settings that change the result. before, now: plain nested configurations."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    keys = [key for key in {**old, **new} if not any(key == s or key.startswith(f"{s}.") for s in LAYOUT_ONLY)]
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", list(value) if isinstance(value, tuple) else value))
    return found
