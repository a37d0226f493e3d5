"""Collects the problems that checks find: one call each, which reads the value by its key."""

from __future__ import annotations

import math
from typing import Any

from kdtrain.config.problems import Problem
from kdtrain.config.schema import RunConfig

CONFIGURED = object()
"""Stands for the value that the configuration holds."""


class Report:
    """Problems of one configuration, in the order in which they were found.

    `key` is the dotted name of a setting everywhere. Its value is read from the configuration unless `value` gives
    another, for keys of a free-form mapping and for values to be shown differently.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self.problems: list[Problem] = []
        self._cfg = cfg

    def add(self, key: str, why: str, fix: str, value: object = CONFIGURED) -> None:
        """Add a problem. why: completes the sentence "<key> = <value> ..."; fix: what to do."""
        self.problems.append(Problem(key, self._value(key) if value is CONFIGURED else value, why, fix))

    def ignored(self, key: str, because: str, fix: str) -> None:
        """Add the problem of a setting that would have no effect. because: the setting that disables it, "a.b = c"."""
        self.add(key, f"would be ignored: {because}", fix)

    def at_least(self, key: str, least: int, fix: str | None = None) -> None:
        """Add a problem if the number is smaller than `least`. null passes."""
        value = self._value(key)
        if value is not None and value < least:
            self.add(key, f"is smaller than {least}", fix or f"use {least} or more")

    def positive(self, key: str, fix: str) -> None:
        """Add a problem unless the number is above 0 and finite. null passes."""
        value = self._value(key)
        if value is not None and not 0 < value < math.inf:
            self.add(key, "is not a positive number", fix)

    def _value(self, key: str) -> Any:
        value: Any = self._cfg
        for name in key.split("."):
            value = getattr(value, name)
        return value
