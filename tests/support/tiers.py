"""Parametrisations whose cases belong to two tiers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_cases(values: Iterable[Any], *slow: Any) -> list[Any]:
    """All `values` of a parametrisation; those that equal one of `slow` run in the slow tier only."""
    return [pytest.param(value, marks=pytest.mark.slow) if value in slow else value for value in values]


def fast_cases(values: Iterable[Any], *fast: Any) -> list[Any]:
    """All `values` of a parametrisation; those that equal none of `fast` run in the slow tier only."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
