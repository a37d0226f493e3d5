"""Comparison of two tokenizers: whether their ids have the same meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from kdtrain.data.tokenizer import fingerprint, load_tokenizer, tokenizer_file

PROBES = (
    "Hello world",
    "  two spaces, a\ttab and\r\n a newline  ",
    "It's 2026-11-21, 12345.678 and\n  42 things",
    "def f(x):\n    return x ** 2  # na\u00efve",
    "\u00dcber-Stra\u00dfe, \u6771\u4eac, \u043f\u0440\u0438\u0432\u0435\u0442, \U0001f642",
)
"""Ordinary text on which tokenizers of the same vocabulary but other rules usually differ."""

SPECIAL_PROBE = "<|endoftext|> <|im_start|>"
"""Names of added tokens; not used when one of the tokenizers lacks one of them."""

Names = tuple[str | None, str | None]
"""Name of an id in the first and in the second tokenizer; None: no such id."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """difference: why ids differ in meaning; None when all ids except `unshared` have the same meaning.

    unshared: ids of added tokens that only one of the two has, or that are other tokens in the other. Text that holds
    none of these tokens has the same ids in both.
    """

    difference: str | None
    unshared: Mapping[int, Names] = field(default_factory=dict)


def compare_tokenizers(first: str | Path, second: str | Path) -> Comparison:
    """Compare two folders by probe strings, then by every id's name.

    Equal files or fingerprints need no comparison. Raises as `load_tokenizer`.
    """
    if tokenizer_file(first).read_bytes() == tokenizer_file(second).read_bytes():
        load_tokenizer(first)  # refuses what is not a tokenizer
        return Comparison(None)
    if fingerprint(first) == fingerprint(second):
        return Comparison(None)
    a, b = load_tokenizer(first), load_tokenizer(second)
    names_a, names_b = _names(a), _names(b)
    unshared = {
        number: (names_a.get(number), names_b.get(number))
        for number in sorted(names_a.keys() | names_b.keys())
        if names_a.get(number) != names_b.get(number)
    }
    lacking = any(name is not None and name in SPECIAL_PROBE for pair in unshared.values() for name in pair)
    for probe in PROBES if lacking else (*PROBES, SPECIAL_PROBE):
        ids_a, ids_b = (t.encode(probe, add_special_tokens=False).ids for t in (a, b))
        if ids_a != ids_b:
            same = [x == y for x, y in zip(ids_a, ids_b, strict=False)]
            start = max(0, (len(same) if all(same) else same.index(False)) - 4)
            shown_a, shown_b = _short(ids_a, start), _short(ids_b, start)
            return Comparison(f"{probe!r} is {shown_a} in {first} and {shown_b} in {second}")
    added = a.get_added_tokens_decoder(), b.get_added_tokens_decoder()
    for number, names in unshared.items():
        if any(name is not None and number not in there for name, there in zip(names, added, strict=True)):
            return Comparison(_described(number, names, first, second))
    return Comparison(None, unshared)


def _described(number: int, names: Names, first: str | Path, second: str | Path) -> str:
    if None in names:
        return f"token {names[0] or names[1]!r} with id {number} is in only one of them"
    return f"id {number} is {names[0]!r} in {first} and {names[1]!r} in {second}"


def _names(tokenizer: Tokenizer) -> dict[int, str]:
    return {number: name for name, number in tokenizer.get_vocab(with_added_tokens=True).items()}


def _short(ids: list[int], start: int) -> str:
    """At most twelve ids from `start` on."""
    cut = ids[start : start + 12]
    return f"[{'..., ' if start else ''}{', '.join(map(str, cut))}{', ...' if start + 12 < len(ids) else ''}]"
