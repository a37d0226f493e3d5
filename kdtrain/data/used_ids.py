"""Read all tokens of a store once to find which of some ids occur."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import numpy as np

from kdtrain.log import LOGGER

CHUNK_TOKENS = 1 << 22
"""Tokens in memory at a time."""
REPORT_EVERY_S = 10.0


class Tokens(Protocol):
    """Tokens of a store."""

    path: Path

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), int64."""


def scan_ids(store: Tokens, wanted: Collection[int]) -> list[int]:
    """The ids of `wanted` (at least 0) that occur in `store`, ascending. Logs progress every ten seconds."""
    ids = np.array(sorted(wanted), dtype=np.int64)
    if len(ids) == 0:
        return []
    seen = np.zeros(int(ids[-1]) + 1, dtype=bool)
    last = time.monotonic()
    for start in range(0, store.num_tokens, CHUNK_TOKENS):
        tokens = store.tokens(start, min(start + CHUNK_TOKENS, store.num_tokens))
        seen[tokens[(tokens >= 0) & (tokens < len(seen))]] = True
        if time.monotonic() - last > REPORT_EVERY_S:
            last = time.monotonic()
            LOGGER.info("data     scanning %s: %.0f %%", store.path, 100 * start / store.num_tokens)
    return [int(i) for i in ids[seen[ids]]]
