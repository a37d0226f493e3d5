"""Checks of section zero."""

from __future__ import annotations

import math
from typing import Any

from kdtrain.config.checks.report import Report
from kdtrain.config.deepspeed_config import EXTRA_ZERO_KEYS, OWNED_ZERO_KEYS
from kdtrain.config.keys import suggestion_among
from kdtrain.config.schema import RunConfig


def check_zero(cfg: RunConfig, report: Report) -> None:
    """Master weights, offloading and zero.extra."""
    zero = cfg.zero
    if zero.stage == 0 and cfg.student.dtype == "bfloat16":
        fix = "use zero.stage=1, which costs no more memory, or student.dtype=float32"
        report.add("zero.stage", "with student.dtype = bfloat16 would keep no float32 master weights", fix)
    if zero.offload_optimizer and zero.stage == 0:
        fix = "use zero.stage=1, or set zero.offload_optimizer=false"
        report.ignored("zero.offload_optimizer", "zero.stage = 0 updates the weights in place", fix)
    for name, value in zero.extra.items():
        _extra(name, value, report)


def _extra(name: str, value: Any, report: Report) -> None:
    key, kind = f"zero.extra.{name}", EXTRA_ZERO_KEYS.get(name)
    if name in OWNED_ZERO_KEYS:
        report.add(key, f"may not be set: {OWNED_ZERO_KEYS[name]}", "remove it", value=value)
    elif kind is None:
        meant = suggestion_among(name, EXTRA_ZERO_KEYS)
        fix = f"did you mean {meant}?" if meant else f"known: {', '.join(EXTRA_ZERO_KEYS)}"
        report.add(key, "is not a key of DeepSpeed's zero_optimization that may be set", fix, value=value)
    elif kind == "switch" and not isinstance(value, bool):
        report.add(key, "is neither true nor false", "write true or false", value=value)
    elif kind != "switch" and not (_is_count(value) and (value or kind == "count")):
        why = f"is not a whole number of elements{'' if kind == 'count' else ' above 0'}"
        report.add(key, why, "write e.g. 500_000_000 or 5e8", value=value)


def _is_count(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value >= 0 and math.isfinite(value) and value == int(value)
