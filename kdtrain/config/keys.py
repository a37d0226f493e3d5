"""Which settings exist and what each accepts, derived from the schema's type hints."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kdtrain.config.schema import RunConfig

MUST_BE_SET = "???"
"""Default of a field that has none."""


@dataclass(frozen=True, slots=True)
class Key:
    """One dotted key of the schema. hint: its type; `section`: the dataclass it holds, None for a plain setting."""

    name: str
    hint: Any
    section: type | None
    default: Any

    @property
    def is_free_form(self) -> bool:
        """A mapping with arbitrary keys: the loader accepts anything below it."""
        return get_origin(self.hint) is dict

    @property
    def is_list(self) -> bool:
        """Whether every value but null is a list."""
        return all(get_origin(part) in (list, tuple) for part in _alternatives(self.hint))

    @property
    def is_text(self) -> bool:
        """Whether the value, or each item of it, is a string: then 007 and 1.10 are text, not numbers."""
        items = (
            part if get_origin(part) not in (list, tuple) else get_args(part)[0] for part in _alternatives(self.hint)
        )
        return str in items


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, None left out; a plain type alone."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(part for part in get_args(hint) if part is not type(None))
    return (hint,)


def all_keys() -> dict[str, Key]:
    """Every key of RunConfig by its dotted name, sections before their members, in schema order."""
    return {key.name: key for key in _walk(RunConfig, "")}


def _walk(section: type, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(section)
    for field in fields(section):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        inner = hint if isinstance(hint, type) and is_dataclass(hint) else None
        yield Key(name, hint, inner, None if inner else _default(field))
        if inner:
            yield from _walk(inner, f"{name}.")


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    assert field.default_factory is not MISSING
    return field.default_factory()


def expected(hint: Any) -> str:
    """What a setting of this type accepts, as words: "an integer or null"."""
    parts = [_words(part) for part in _alternatives(hint)]
    if type(None) in get_args(hint):
        parts.append("null")
    return " or ".join(parts)


def _words(hint: Any) -> str:
    simple = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    if hint in simple:
        return simple[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in inner)}"
    if origin is list:
        return f"a list of {_words(inner[0]).partition(' ')[2]}s"
    if origin is tuple:
        return f"a list of {len(inner)} {_words(inner[0]).partition(' ')[2]}s"
    return "a mapping"


def suggestion_among(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` whose spelling is most similar to `name`; None if none is similar."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.7)
    return near[0] if near else None


def suggestion(name: str, known: dict[str, Key]) -> str | None:
    """The existing key that is most similar to `name`, or several joined by "or"; None if none is similar.

    A sibling with a similar leaf comes first, then the same leaf in another section, then a similar spelling anywhere.
    """
    parent, _, leaf = name.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(leaf, [key.rpartition(".")[2] for key in siblings], n=1, cutoff=0.7)
    if near:
        return f"{parent}.{near[0]}" if parent else near[0]
    elsewhere = [key for key in known if key.rpartition(".")[2] == leaf]
    if elsewhere:
        return " or ".join(elsewhere[:3])
    corrected = suggestion(parent, known) if parent and parent not in known else None
    if corrected is not None:
        whole = f"{corrected}.{leaf}"
        return whole if whole in known else corrected
    others = [key for key in known if not name.startswith(f"{key}.")]
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.7)
    if near:
        return near[0]
    leaves = difflib.get_close_matches(leaf, [key.rpartition(".")[2] for key in others], n=1, cutoff=0.8)
    return next((key for key in others if key.rpartition(".")[2] == leaves[0]), None) if leaves else None
