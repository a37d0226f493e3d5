"""Which sequence comes n-th: an infinite order that depends on seed and weights only, computed, not remembered.

Any position can be asked for at once, so a resumed run needs one integer and no layout changes the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from kdtrain.errors import DataError

BLOCK = 1 << 16
"""Positions over which the shares of a blend hold exactly."""
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
    """Where a pseudo-random permutation of [0, size) sends `index`; another permutation for each tuple of keys.

    A balanced Feistel network on the next even power of two, walked until it lands inside (Black and Rogaway 2002):
    a bijection by construction, counter-based, four steps on average at worst.
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


class BlendOrder:
    """The infinite order of sequences of several stores.

    sizes: sequences of each store. weights: share of each, any positive numbers (None: in proportion to the sizes).
    Each store is passed through in a fresh permutation per epoch; in every BLOCK positions each store has exactly its
    share, at shuffled places. Raises DataError for an empty store or a share that rounds to nothing.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        for number, size in enumerate(sizes):
            if size < 1:
                raise DataError(
                    f"data.train[{number}] has not one complete sequence\n"
                    "  fix: use a larger corpus, or a smaller data.seq_len"
                )
        shares = np.asarray(sizes if weights is None else weights, dtype=np.float64)
        exact = shares / shares.sum() * BLOCK
        counts = np.floor(exact).astype(np.int64)
        by_remainder = np.argsort(-(exact - counts), kind="stable")
        counts[by_remainder[: BLOCK - int(counts.sum())]] += 1
        if (counts == 0).any():
            number = int(np.argmin(counts))
            raise DataError(
                f"data.train[{number}] has a share of {shares[number] / shares.sum():.2e}, less than one sequence in {BLOCK}\n"
                "  why: it would never be drawn\n  fix: raise its weight, or leave it out"
            )
        self._sizes, self._counts, self._seed = list(sizes), counts, seed
        self._block = lru_cache(maxsize=4)(self._make_block)

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of a block: the store, and how many places before it in the block have the same store."""
        places = permute(np.arange(BLOCK), BLOCK, self._seed, 1, block)
        stores = np.repeat(np.arange(len(self._counts)), self._counts)[places]
        rank = np.zeros(BLOCK, dtype=np.int64)
        for store in range(len(self._counts)):
            mine = stores == store
            rank[mine] = np.arange(int(mine.sum()))
        return stores, rank

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(store, sequence in it) at a position >= 0 of the order."""
        if len(self._sizes) == 1:
            store, drawn = 0, position
        else:
            block, place = divmod(position, BLOCK)
            stores, rank = self._block(block)
            store = int(stores[place])
            drawn = block * int(self._counts[store]) + int(rank[place])
        epoch, index = divmod(drawn, self._sizes[store])
        return store, int(permute(index, self._sizes[store], self._seed, 2, store, epoch)[0])
