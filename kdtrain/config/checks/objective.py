"""Checks of section objective: settings of the chosen one only, each in its range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from kdtrain.config.checks.report import Report
from kdtrain.config.schema import DistillObjective, ObjectiveSection
from kdtrain.config.schema.objective import ParameterOf, parameters

TEMPERATURES = (0.01, 100.0)
"""Outside this range a float32 softmax is one-hot or uniform."""
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
    known = parameters(d)
    for name in _changed(d, DistillObjective()):
        if name in known and d.divergence not in known[name].divergences:
            fix = f"remove it, or use the divergence {' or '.join(known[name].divergences)}"
            report.ignored(KEY + name, f"{KEY}divergence = {d.divergence}", fix)
    if not 0 <= d.kd_weight <= 1:
        report.add(KEY + "kd_weight", "is not in [0, 1]", "it is a mixing weight, 0.5 mixes evenly")
    low, high = TEMPERATURES
    if not low <= d.temperature <= high:
        report.add(KEY + "temperature", f"is not in [{low:g}, {high:g}]", "1 is usual, 2 softens")
    for name, of in known.items():
        if d.divergence in of.divergences:
            _parameter(d, name, of, report)


def _parameter(d: DistillObjective, name: str, of: ParameterOf, report: Report) -> None:
    """A parameter that the divergence reads: its range, its size and its sum with another one."""
    value = getattr(d, name)
    if of.least_size and not (math.isfinite(value) and abs(value) >= of.least_size):
        report.add(KEY + name, f"is not a finite number of at least {of.least_size:g} in size", of.fix)
    elif not of.low < value < of.high:
        report.add(KEY + name, f"is not in ({of.low:g}, {of.high:g})", of.fix)
    if of.sum_with:
        other = getattr(d, of.sum_with)
        if math.isfinite(value) and math.isfinite(other) and value + other <= 0:
            report.add(KEY + name, f"and {of.sum_with} = {other} do not add up to more than 0", "0.5, 0.5 works")


CHECKS: dict[str, Callable[[Any, Report], None]] = {"distill": _distill}
"""Value of objective.name -> the check of its section, if it has settings."""
