"""The n-th sequence of an infinite order that depends on seed, sizes and weights only.

Any position is computed directly, so a resumed run needs one integer and no layout changes the order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdtrain.errors import DataError

BLOCK = 1 << 16
"""Positions after which the schedule of a blend repeats; shares are rounded to whole sequences per block."""
STORE_SHIFT = 40
"""sample_id = store << STORE_SHIFT | sequence: room for 2^40 sequences per store."""

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


class BlendOrder:
    """The infinite order of sequences of several stores.

    sizes: sequences of each store. weights: share of each, any positive numbers (None: in proportion to the sizes).
    Each store is read in another permutation in each epoch; in every BLOCK positions each store has its share, to
    the nearest whole sequence, spread evenly. Raises DataError for an empty store, a weight that is not a positive
    number, or a share that rounds to nothing.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        for number, size in enumerate(sizes):
            if size < 1:
                raise DataError(
                    f"data.train[{number}] has no complete sequence\n"
                    "  fix: use a larger corpus, or a smaller data.seq_len"
                )
        self._sizes, self._seed = [int(size) for size in sizes], seed
        self._counts = _counts(np.asarray(sizes if weights is None else weights, dtype=np.float64), len(sizes))
        self._stores, self._rank = schedule(self._counts)

    @property
    def sizes(self) -> list[int]:
        """Sequences of each store."""
        return list(self._sizes)

    def draws(self, positions: int) -> list[int]:
        """Draws of each store in the first `positions` of the order. Exact, in constant time."""
        blocks, rest = divmod(positions, BLOCK)
        found: np.ndarray = blocks * self._counts + np.bincount(self._stores[:rest], minlength=len(self._sizes))
        return [int(count) for count in found]

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(store, sequence in it) at a position >= 0 of the order, in constant time."""
        if position < 0:
            raise IndexError(f"position {position} is negative")
        block, place = divmod(position, BLOCK)
        store = int(self._stores[place])
        drawn = block * int(self._counts[store]) + int(self._rank[place])
        epoch, index = divmod(drawn, self._sizes[store])
        return store, int(permute(index, self._sizes[store], self._seed, store, epoch)[0])


def _counts(weights: np.ndarray, num_stores: int) -> np.ndarray:
    """Draws of each store in a block: BLOCK in total, rounded by largest remainder."""
    if len(weights) != num_stores or not np.all((weights > 0) & np.isfinite(weights)):
        raise DataError(
            f"weights {weights.tolist()} do not fit {num_stores} stores\n  fix: give each store one positive weight"
        )
    weights = np.ldexp(weights, -np.frexp(weights.max())[1])  # exact scaling, against overflow of the sum
    exact = weights / weights.sum() * BLOCK
    counts: np.ndarray = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(-(exact - counts), kind="stable")
    counts[by_remainder[: BLOCK - int(counts.sum())]] += 1
    if (counts == 0).any():
        number = int(np.argmin(counts))
        share = weights[number] / weights.sum()
        raise DataError(
            f"data.train[{number}] has a share of {share:.2e}, less than one sequence in {BLOCK}\n"
            "  why: it would never be drawn\n  fix: raise its weight, or leave it out"
        )
    return counts
