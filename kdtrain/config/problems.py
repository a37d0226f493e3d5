"""Problems of a configuration as data: collected first, then printed together in one format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

DEFAULT = "default"
"""Origin of a setting that keeps its default."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a run cannot start.

    key: dotted setting, "" if the problem is not one setting's. value: as given. why: completes the sentence
    "<key> = <value> ..."; without a key it is the whole sentence. fix: what to do. origin: "file.yaml:12" or
    "command line"; None: taken from the loader's record of origins.
    """

    key: str
    value: object
    why: str
    fix: str
    origin: str | None = None


def format_problems(problems: Iterable[Problem], origins: Mapping[str, str]) -> str:
    """All problems, each with where its setting came from, the reason and a fix; the count comes first."""
    found = list(dict.fromkeys(_blocks(problems, origins)))
    count = f"{len(found)} problem{'s' if len(found) != 1 else ''} in this run's configuration"
    return "\n\n".join([count, *found])


def _blocks(problems: Iterable[Problem], origins: Mapping[str, str]) -> Iterable[str]:
    """One block of text per problem."""
    for problem in problems:
        if problem.key:
            origin = problem.origin or origins.get(problem.key, DEFAULT)
            head = f"  {problem.key} = {show(problem.value)}    [{origin}]\n      {problem.why}"
        else:
            head = f"  {f'{problem.origin}: ' if problem.origin else ''}{problem.why}"
        yield f"{head}\n      fix: {problem.fix}"


def show(value: object) -> str:
    """A value as it is written in YAML, shortened to 120 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(show(item) for item in value)}]"
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
