"""Checks of section objective: settings of the chosen one only, each in its range.

Nothing here names an objective: a section says in `problems` what is wrong with it, and its parameters of divergences
have their ranges with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from kdtrain.config.checks.report import Report
from kdtrain.config.schema import ObjectiveSection, ObjectiveSettings
from kdtrain.config.schema.objective import ParameterOf, parameters


def check_objective(objective: ObjectiveSection, report: Report) -> None:
    """Settings of objectives that were not chosen, the z-loss, and the settings of the chosen one."""
    for section in fields(objective):
        if section.name in ("name", "z_loss", objective.name):
            continue
        other = getattr(objective, section.name)
        for field in _changed(other):
            fix = f"remove it, or set objective.name={section.name}"
            report.ignored(f"objective.{section.name}.{field}", f"objective.name = {objective.name}", fix)
    if not 0 <= objective.z_loss < 1:
        report.add("objective.z_loss", "is not in [0, 1)", "1e-4 is usual, 0 switches it off")
    chosen, key = getattr(objective, objective.name), f"objective.{objective.name}."
    _parameters(chosen, key, report)
    for name, why, fix in chosen.problems():
        report.add(key + name, why, fix)


def _changed(section: Any) -> Iterator[str]:
    """Names of the fields that differ from the defaults."""
    defaults = type(section)()
    for field in fields(section):
        if getattr(section, field.name) != getattr(defaults, field.name):
            yield field.name


def _parameters(section: Any, key: str, report: Report) -> None:
    """Parameters of divergences: those that section.divergence does not read, and the values of those it reads."""
    known = parameters(section)
    for name in _changed(section):
        if name in known and section.divergence not in known[name].divergences:
            fix = f"remove it, or use the divergence {' or '.join(known[name].divergences)}"
            report.ignored(key + name, f"{key}divergence = {section.divergence}", fix)
    for name, of in known.items():
        if section.divergence in of.divergences:
            _value(section, name, of, key, report)


def _value(section: ObjectiveSettings, name: str, of: ParameterOf, key: str, report: Report) -> None:
    """A parameter that the divergence reads: its range, its size and its sum with another one."""
    value = getattr(section, name)
    if of.least_size and not (math.isfinite(value) and abs(value) >= of.least_size):
        report.add(key + name, f"is not a finite number of at least {of.least_size:g} in size", of.fix)
    elif not of.low < value < of.high:
        report.add(key + name, f"is not in ({of.low:g}, {of.high:g})", of.fix)
    if of.sum_with:
        other = getattr(section, of.sum_with)
        if math.isfinite(value) and math.isfinite(other) and value + other <= 0:
            report.add(key + name, f"and {of.sum_with} = {other} do not add up to more than 0", "0.5, 0.5 works")
