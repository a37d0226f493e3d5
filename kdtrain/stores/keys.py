"""Keys of sequences: which store, cut by which rule, which number; and their 64-bit form."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kdtrain.errors import StoreMismatch

NUMBER_BITS = 40
"""Low bits of a 64-bit key: the number of the sequence in its store."""
HASH_BITS = 23
"""Bits above them: a hash of both fingerprints. The sign bit stays 0."""


@dataclass(frozen=True, slots=True)
class SequenceKeys:
    """The keys of all sequences of one store under one rule of cutting it.

    store: fingerprint of the token store. spec: fingerprint of the rule (`kdtrain.data.packing.PackingSpec`).
    base: the 64-bit key of sequence 0.
    """

    store: str
    spec: str
    base: int = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(f"{self.store}\n{self.spec}".encode()).digest()
        object.__setattr__(self, "base", (int.from_bytes(digest[:8], "big") >> (64 - HASH_BITS)) << NUMBER_BITS)

    def key(self, number: int) -> int:
        """The 64-bit key of sequence `number`, in [0, 2^63). ValueError for a number that does not fit."""
        if not 0 <= number < 1 << NUMBER_BITS:
            raise ValueError(f"sequence {number} is not in [0, 2^{NUMBER_BITS})")
        return self.base | number


class KeySpace:
    """The keys of several named stores, which do not overlap; finds store and number of a key.

    keys: (name, keys) of each store; a name is what messages show, most often the store's path. Raises StoreMismatch,
    naming both stores, if two have the same hash.
    """

    def __init__(self, keys: Iterable[tuple[str, SequenceKeys]]) -> None:
        self._names: dict[int, str] = {}
        for name, mine in keys:
            if mine.base in self._names:
                raise StoreMismatch(
                    f"{self._names[mine.base]} and {name} have the same keys: the {HASH_BITS}-bit hash of the "
                    f"fingerprints of store and packing is {mine.base >> NUMBER_BITS} for both\n"
                    "  why: records and random draws of a sequence of one would be used for the other\n"
                    "  fix: leave one of them out, put both corpora into one store, or use another data.seq_len"
                )
            self._names[mine.base] = name

    def decode(self, key: int) -> tuple[str, int]:
        """(name of the store, number of the sequence) of a 64-bit key. KeyError if it is of none of the stores."""
        return self._names[key >> NUMBER_BITS << NUMBER_BITS], key & ((1 << NUMBER_BITS) - 1)

    def by_store(self, keys: Iterable[int]) -> dict[str, list[int]]:
        """Numbers of the sequences with these 64-bit keys, by name of the store, both in the order of `keys`."""
        found: dict[str, list[int]] = {}
        for key in keys:
            name, number = self.decode(key)
            found.setdefault(name, []).append(number)
        return found


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(name, value there, value here) of the first field that differs, None without one; a missing field is None.

    Fields of `here` come first, in their order. Values are compared as JSON gives them back.
    """
    for name in (*here, *(name for name in there if name not in here)):
        if there.get(name) != here.get(name):
            return name, there.get(name), here.get(name)
    return None
