"""Batches under context parallelism: the ranks of a cp group hold consecutive parts of the same sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kdtrain.batch import Batch


@dataclass(frozen=True, slots=True)
class Share:
    """Which share of a step's sequences a rank takes, among data ranks, and which part of each, among cp ranks."""

    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1


def cut_sequences(batch: Batch, cp_rank: int, cp_size: int) -> Batch:
    """The positions [r S/cp, (r + 1) S/cp) of every sequence, r = cp_rank; at cp_size 1 the batch itself.

    Labels are shifted already, so the last label of a part is the first token of the next. position_ids stay those of
    the whole sequence, and so do the documents: one may cross the cut. The result's `host` is None. Does not
    communicate. Raises ValueError unless cp_size divides S.
    """
    if cp_size == 1:
        return batch
    seq_len = batch.input_ids.shape[1]
    if seq_len % cp_size or not 0 <= cp_rank < cp_size:
        raise ValueError(f"part {cp_rank} of {cp_size} of sequences of {seq_len} tokens")
    part = slice(cp_rank * (seq_len // cp_size), (cp_rank + 1) * (seq_len // cp_size))
    # Copies, since views would keep the whole sequences in memory.
    cut = {name: getattr(batch, name)[:, part].clone() for name in ("input_ids", "labels", "loss_mask", "position_ids")}
    return replace(batch, **cut, host=None)
