"""A configuration that can run, changes that break it, and which check reports them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kdtrain.config.checks.report import Report
from kdtrain.config.schema import RunConfig

Case = tuple[dict[str, Any], str, str]
"""Changes to a configuration that runs on 4 ranks, key of the one problem, words of its reason or fix."""
ADDING = ("add", "ignored", "at_least", "positive")
"""Methods of Report that may add a problem."""


def runnable(**changes: Any) -> RunConfig:
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
        section: Any = cfg
        for part in path:
            section = getattr(section, part)
        setattr(section, leaf, value)
    return cfg


def dedicated(ranks: int, **changes: Any) -> dict[str, Any]:
    """Changes to a teacher on `ranks` ranks of its own; further settings of section teacher."""
    return {
        "teacher__layout": "dedicated",
        "teacher__ranks": ranks,
        **{f"teacher__{name}": value for name, value in changes.items()},
    }


def distill(**changes: Any) -> dict[str, Any]:
    """Changes to section objective.distill."""
    return {f"objective__distill__{name}": value for name, value in changes.items()}


class ProblemLines:
    """Records which line of which module adds each problem while it is installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seen: set[tuple[str, int]] = set()
        original = Report.add

        def recording(report: Report, *args: Any, **kwargs: Any) -> None:
            frame = sys._getframe(1)
            while frame.f_globals["__name__"] == Report.__module__:
                assert frame.f_back is not None
                frame = frame.f_back
            self._seen.add((frame.f_globals["__name__"], frame.f_lineno))
            original(report, *args, **kwargs)

        monkeypatch.setattr(Report, "add", recording)

    def modules(self) -> set[str]:
        """Names of the modules that added a problem, without the package's."""
        return {module.rpartition(".")[2] for module, _ in self._seen}

    def not_reached(self, module: ModuleType) -> list[str]:
        """Source of the calls of `module` that can add a problem and have not."""
        assert module.__file__ is not None
        calls = list(_adding_calls(Path(module.__file__)))
        assert calls
        lines = {line for name, line in self._seen if name == module.__name__}
        return [ast.unparse(call) for call in calls if not lines & set(range(call.lineno, (call.end_lineno or 0) + 1))]


def _adding_calls(path: Path) -> Iterable[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        function = node.func if isinstance(node, ast.Call) else None
        if isinstance(function, ast.Attribute) and ast.unparse(function.value) == "report" and function.attr in ADDING:
            assert isinstance(node, ast.Call)
            yield node
