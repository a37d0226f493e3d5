"""The n-th sequence of an infinite order that depends on seed, sizes, weights and numbering of the stores only.

Any position is computed directly, so a resumed run needs one integer and no layout changes the order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdtrain.errors import DataError

BLOCK = 1 << 16
"""Positions after which the schedule of a blend repeats; shares are rounded to whole sequences per block."""

_ROUNDS = 6


def _mix(value: np.ndarray, key: int) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014) of value + key; uint64 arithmetic wraps."""
    x = value + np.uint64(key & 0xFFFFFFFFFFFFFFFF)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray | int, size: int, *keys: int) -> np.ndarray:
    """Image of `index` under a pseudo-random permutation of [0, size); another permutation for each tuple of keys.

    A balanced Feistel network on the next even power of two, applied until the result is below size (cycle walking,
    Black and Rogaway 2002): a bijection by construction, counter-based, at most four applications on average.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    seed = 0
    for key in keys:
        seed = int(_mix(np.array([seed], dtype=np.uint64), key * 0x9E3779B97F4A7C15 + 1)[0])
    out = np.atleast_1d(np.asarray(index, dtype=np.uint64)).copy()
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        left, right = out[outside] >> np.uint64(half), out[outside] & low
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(right, seed + number * 0xD1342543DE82EF95) & low)
        out[outside] = (left << np.uint64(half)) | right
        outside = out >= size
    return out.astype(np.int64)


def schedule(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of sum(counts) draws, the store and its number of earlier draws. Both [sum(counts)] int64.

    The j-th draw of store i is due at (j + 1/2) / counts[i] and draws are served in order of their due times (the rule
    of the largest deficit, for all draws at once): the first n draws hold a store's share of n within one plus half the
    number of stores.
    """
    stores = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(count) for count in counts])
    places = np.lexsort((stores, (rank + 0.5) / counts[stores]))
    return stores[places], rank[places]


def numbering_of(fingerprints: Sequence[str], recorded: Sequence[str] | None = None) -> list[int]:
    """Places in `fingerprints` of store number 0, 1, ...: sorted by fingerprint, so that their order changes no draw.

    recorded: the same fingerprints in the order of the numbers of an earlier run, which then is kept.
    """
    if recorded is None:
        return sorted(range(len(fingerprints)), key=fingerprints.__getitem__)
    return [fingerprints.index(fingerprint) for fingerprint in recorded]


class BlendOrder:
    """The infinite order of sequences of several stores.

    sizes: sequences of each store. weights: share of each, any positive numbers (None: in proportion to the sizes).
    numbering: places in `sizes` of store number 0, 1, ... (None: as listed; see `numbering_of`).
    Each store is read in another permutation in each epoch, keyed by its number; in every BLOCK positions each store
    has its share, to the nearest whole sequence, spread evenly. Raises DataError for an empty store, a weight that is
    not a positive number, or a share that rounds to nothing.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int, numbering: Sequence[int] | None = None
    ) -> None:
        for place, size in enumerate(sizes):
            if size < 1:
                raise DataError(
                    f"data.train[{place}] has no complete sequence\n"
                    "  fix: use a larger corpus, or a smaller data.seq_len"
                )
        self._sizes, self._seed = [int(size) for size in sizes], seed
        self._numbering = list(range(len(sizes)) if numbering is None else numbering)
        self._counts = _counts(self._sizes if weights is None else weights, self._numbering)
        self._stores, self._rank = schedule(self._counts)

    @property
    def sizes(self) -> list[int]:
        """Sequences of each store, as listed."""
        return list(self._sizes)

    def draws(self, positions: int) -> list[int]:
        """Draws of each store, as listed, in the first `positions` of the order. Exact, in constant time."""
        blocks, rest = divmod(positions, BLOCK)
        found: np.ndarray = blocks * self._counts + np.bincount(self._stores[:rest], minlength=len(self._sizes))
        return [int(found[number]) for number in np.argsort(self._numbering)]

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(store as listed, sequence in it) at a position >= 0 of the order, in constant time."""
        if position < 0:
            raise IndexError(f"position {position} is negative")
        block, place = divmod(position, BLOCK)
        number = int(self._stores[place])
        drawn = block * int(self._counts[number]) + int(self._rank[place])
        store = self._numbering[number]
        epoch, index = divmod(drawn, self._sizes[store])
        return store, int(permute(index, self._sizes[store], self._seed, number, epoch)[0])


def _counts(listed: Sequence[float], numbering: Sequence[int]) -> np.ndarray:
    """Draws of each store, by number, in a block: BLOCK in total, rounded by largest remainder.

    listed: the stores' weights, as listed.
    """
    given = np.asarray(listed, dtype=np.float64)
    if len(given) != len(numbering) or not np.all((given > 0) & np.isfinite(given)):
        raise DataError(
            f"weights {given.tolist()} do not fit {len(numbering)} stores\n  fix: give each store one positive weight"
        )
    weights = given[list(numbering)]
    weights = np.ldexp(weights, -np.frexp(weights.max())[1])  # exact scaling, against overflow of the sum
    exact = weights / weights.sum() * BLOCK
    counts: np.ndarray = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(-(exact - counts), kind="stable")
    counts[by_remainder[: BLOCK - int(counts.sum())]] += 1
    if (counts == 0).any():
        number = int(np.argmin(counts))
        share = weights[number] / weights.sum()
        raise DataError(
            f"data.train[{numbering[number]}] has a share of {share:.2e}, less than one sequence in {BLOCK}\n"
            "  why: it would never be drawn\n  fix: raise its weight, or leave it out"
        )
    return counts
