"""Checks of section objective: settings of the chosen one only, each in its range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from kdtrain.config.checks.report import Report
from kdtrain.config.schema import DistillObjective, ObjectiveSection

LEAST_EXPONENT = 0.01
TEMPERATURES = (0.01, 100.0)
"""Outside this range a float32 softmax is one-hot or uniform."""
DIVERGENCE_SETTINGS = {
    "teacher_share": ("jsd",),
    "skew": ("skew_kl", "skew_reverse_kl"),
    "ab_alpha": ("alpha_beta",),
    "ab_beta": ("alpha_beta",),
}
"""Field of objective.distill -> the divergences that read it."""
KEY = "objective.distill."


def check_objective(objective: ObjectiveSection, report: Report) -> None:
    """Settings of objectives that were not chosen, the z-loss, and the settings of the chosen one."""
    for section in fields(objective):
        if section.name in ("name", "z_loss", objective.name):
            continue
        chosen = getattr(objective, section.name)
        for field in _changed(chosen, type(chosen)()):
            fix = f"remove it, or set objective.name={section.name}"
            report.ignored(f"objective.{section.name}.{field}", f"objective.name = {objective.name}", fix)
    if not 0 <= objective.z_loss < 1:
        report.add("objective.z_loss", "is not in [0, 1)", "1e-4 is usual, 0 switches it off")
    if check := CHECKS.get(objective.name):
        check(getattr(objective, objective.name), report)


def _changed(section: Any, defaults: Any) -> Iterator[str]:
    """Names of the fields that differ from the defaults."""
    for field in fields(section):
        if getattr(section, field.name) != getattr(defaults, field.name):
            yield field.name


def _distill(d: DistillObjective, report: Report) -> None:
    for name in _changed(d, DistillObjective()):
        if d.divergence not in DIVERGENCE_SETTINGS.get(name, (d.divergence,)):
            fix = f"remove it, or use the divergence {' or '.join(DIVERGENCE_SETTINGS[name])}"
            report.ignored(KEY + name, f"{KEY}divergence = {d.divergence}", fix)
    if not 0 <= d.kd_weight <= 1:
        report.add(KEY + "kd_weight", "is not in [0, 1]", "it is a mixing weight, 0.5 mixes evenly")
    low, high = TEMPERATURES
    if not low <= d.temperature <= high:
        report.add(KEY + "temperature", f"is not in [{low:g}, {high:g}]", "1 is usual, 2 softens")
    if d.divergence == "jsd" and not 0 < d.teacher_share < 1:
        report.add(KEY + "teacher_share", "is not in (0, 1)", "its ends are forward_kl, reverse_kl")
    if d.divergence in ("skew_kl", "skew_reverse_kl") and not 0 < d.skew < 1:
        report.add(KEY + "skew", "is not in (0, 1)", "0.1 is usual; at 0 it is forward_kl or reverse_kl")
    if d.divergence == "alpha_beta":
        _exponents(d, report)


def _exponents(d: DistillObjective, report: Report) -> None:
    exponents = (("ab_alpha", d.ab_alpha), ("ab_beta", d.ab_beta))
    for name, value in exponents:
        if not (math.isfinite(value) and abs(value) >= LEAST_EXPONENT):
            why = f"is not a finite number of at least {LEAST_EXPONENT} in size"
            report.add(KEY + name, why, "the limits (1, 0) and (0, 1) are the two KLs")
    if all(math.isfinite(value) for _, value in exponents) and d.ab_alpha + d.ab_beta <= 0:
        report.add(KEY + "ab_beta", f"and ab_alpha = {d.ab_alpha} do not add up to more than 0", "0.5, 0.5 works")


CHECKS: dict[str, Callable[[Any, Report], None]] = {"distill": _distill}
"""Value of objective.name -> the check of its section, if it has settings."""
