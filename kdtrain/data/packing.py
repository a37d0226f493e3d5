"""From the token stream of a store to fixed-length sequences. S tokens per sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kdtrain.data.batch import Batch
from kdtrain.data.token_store import TokenStore
from kdtrain.errors import DataError

Packed = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""input_ids, labels, loss_mask, position_ids of one sequence, each [S]."""


def num_sequences(store: TokenStore, seq_len: int) -> int:
    """Complete sequences: each needs seq_len tokens and the one that follows as its last label."""
    return max(0, (store.num_tokens - 1) // seq_len)


def pack(store: TokenStore, sequence: int, seq_len: int, *, reset_positions: bool = True) -> Packed:
    """Sequence number `sequence`: tokens [k S, (k + 1) S) of the stream, labels one further.

    With reset_positions, position_ids restart at each document and nothing is predicted across a border: the label
    after a document's last token does not count. Tokens past the end of the store are 0, a document of their own
    there, and do not count.
    IndexError for a sequence that begins outside the store, DataError for a token outside the vocabulary.
    """
    start = sequence * seq_len
    if not 0 <= start < store.num_tokens:
        raise IndexError(
            f"sequence {sequence} of {seq_len} tokens is outside the {store.num_tokens} tokens of {store.path}"
        )
    stop = min(start + seq_len + 1, store.num_tokens)
    tokens = np.zeros(seq_len + 1, dtype=np.int64)
    tokens[: stop - start] = store.tokens(start, stop)
    if tokens.min() < 0 or tokens.max() >= store.manifest.vocab_size:
        # said here: on a device it would be an assert without a name
        bad = int(np.argmax((tokens < 0) | (tokens >= store.manifest.vocab_size)))
        raise DataError(
            f"{store.path} is damaged: token {start + bad} is {int(tokens[bad])}, not in "
            f"[0, {store.manifest.vocab_size})\n  fix: name the damaged file with TokenStore.verify, then copy it again"
        )
    positions = np.arange(seq_len, dtype=np.int64)
    mask = np.ones(seq_len, dtype=np.float32)
    if reset_positions:
        begins = store.document_starts(start, stop) - start
        mask[begins[begins > 0] - 1] = 0.0
        inside = np.append(begins, stop - start)  # padding is a document of its own: it lengthens none
        inside = inside[inside < seq_len]
        origin = np.zeros(seq_len, dtype=np.int64)
        origin[inside] = inside
        positions -= np.maximum.accumulate(origin)
    mask[max(stop - start - 1, 0) :] = 0.0
    return tokens[:-1], tokens[1:], mask, positions


def stack(packed: Sequence[Packed], sample_ids: Sequence[int]) -> Batch:
    """Sequences of one length as a micro-batch on the CPU."""
    ids, labels, mask, positions = (torch.from_numpy(np.stack(part)) for part in zip(*packed, strict=True))
    return Batch(ids, labels, mask, positions, torch.tensor(list(sample_ids), dtype=torch.int64))
