"""Problems are data: collected all at once, printed once, in one format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a run cannot start.

    key: dotted setting ("" if the problem is not one setting's). value: as given. why: completes the sentence
    "<key> = <value> ...". fix: what to do.
    """

    key: str
    value: object
    why: str
    fix: str


def format_problems(problems: Iterable[Problem], origins: dict[str, str]) -> str:
    """All problems, each with where its setting came from, the reason and a fix."""
    found = list(problems)
    count = f"{len(found)} problem{'s' if len(found) != 1 else ''} in this run's configuration"
    blocks = []
    for problem in found:
        if problem.key:
            where = origins.get(problem.key, "default")
            head = f"  {problem.key} = {_shown(problem.value)}    [{where}]\n      {problem.why}"
        else:
            head = f"  {problem.why}"
        blocks.append(f"{head}\n      fix: {problem.fix}")
    return "\n\n".join([count, *blocks])


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
