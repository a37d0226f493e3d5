"""What is known of the teacher at the positions of one sequence, of any target; to and from a `SparseTarget`.

S positions, N kept and M drawn entries of all positions together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kdtrain.losses.types import SparseTarget
from kdtrain.teacher.stored.bits import Array

HIDDEN_TYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""numpy's type of hidden states by dtype; numpy has no bfloat16 and sees its bits."""
MAX_VOCAB = 1 << 31


@dataclass(frozen=True, slots=True)
class RecordFields:
    """What the records of a store hold, the same for all of its sequences.

    vocab_size: ids are below it. draws: none (every id has a weight of its own, as in top-k), equal (drawn ids share
    the rest of the probability equally, as in threshold sampling) or counts (by how often each was drawn). samples:
    draws per position, with counts only. tail: the rest is a tail bucket; without draws only. boundary: log boundary
    mass (ALM) per position. hidden_size, hidden_dtype: of the teacher's hidden states per position; 0: none.
    ValueError for fields that contradict each other.
    """

    vocab_size: int
    draws: Literal["none", "equal", "counts"] = "none"
    samples: int = 0
    tail: bool = False
    boundary: bool = False
    hidden_size: int = 0
    hidden_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if not 0 < self.vocab_size <= MAX_VOCAB or self.hidden_size < 0:
            raise ValueError(f"vocab_size = {self.vocab_size}, hidden_size = {self.hidden_size}")
        if self.draws not in ("none", "equal", "counts") or self.hidden_dtype not in HIDDEN_TYPES:
            raise ValueError(f"draws = {self.draws!r}, hidden_dtype = {self.hidden_dtype!r}")
        if (self.draws == "counts") != (self.samples > 0):
            raise ValueError(f"samples = {self.samples} with draws = {self.draws!r}: only counts need it")
        if self.tail and self.draws != "none":
            raise ValueError(f"a tail bucket and draws = {self.draws!r}: the rest of the probability is one of them")

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> RecordFields:
        """The fields that `as_json` gave. TypeError for others."""
        return cls(**found)


@dataclass(frozen=True, slots=True)
class SequenceRecords:
    """The records of one sequence. Entries of a position are neighbours, in ascending order of ids once stored.

    kept, drawn [S] int64: entries with a weight of their own, and drawn ones, per position. kept_ids [N], drawn_ids
    [M] int64; kept_weights [N] float32, probabilities; counts [M] int64, of drawn ids, or None if all are 1. rest [S]
    float32: probability outside the kept ids, which the drawn ids share; 1 at a position without any id.
    label_log_prob, entropy, boundary [S] float32, nats; hidden [S, D]. boundary and hidden are None if not stored.
    """

    kept: Array
    kept_ids: Array
    kept_weights: Array
    drawn: Array
    drawn_ids: Array
    counts: Array | None
    rest: Array
    label_log_prob: Array
    entropy: Array
    boundary: Array | None = None
    hidden: Array | None = None

    def __len__(self) -> int:
        """S, the number of positions."""
        return len(self.rest)

    @classmethod
    def of_target(
        cls, target: SparseTarget, fields: RecordFields, boundary: Tensor | None = None, hidden: Tensor | None = None
    ) -> SequenceRecords:
        """Of a sparse target of S positions [S, K]; boundary [S], hidden [S, D] of fields.hidden_dtype.

        With equal draws, ids of a row's smallest weight are the drawn ones; with counts, the ids of the last `samples`
        slots are.
        """
        ids, weights = _array(target.ids).astype(np.int64), _array(target.weights).astype(np.float64)
        used = ids >= 0
        if fields.draws == "equal":
            is_drawn = used & (weights <= weights.min(1, where=used, initial=np.inf)[:, None])
        else:
            is_drawn = used & (np.arange(ids.shape[1]) >= ids.shape[1] - fields.samples)
        is_kept = used & ~is_drawn
        rest = weights.sum(1, where=is_drawn)
        if target.log_tail is not None:
            rest = np.exp(_array(target.log_tail).astype(np.float64))
        rest = np.where(used.any(1), rest, 1.0)
        counts = None
        if fields.draws == "counts":
            counts = np.rint((weights * (fields.samples / np.maximum(rest, 1e-300))[:, None])[is_drawn])
        return cls(
            kept=is_kept.sum(1),
            kept_ids=ids[is_kept],
            kept_weights=weights[is_kept].astype(np.float32),
            drawn=is_drawn.sum(1),
            drawn_ids=ids[is_drawn],
            counts=None if counts is None else counts.astype(np.int64),
            rest=rest.astype(np.float32),
            label_log_prob=_array(target.label_log_prob).astype(np.float32),
            entropy=_array(target.entropy).astype(np.float32),
            boundary=None if boundary is None else _array(boundary).astype(np.float32),
            hidden=None if hidden is None else _array(hidden),
        )

    def to_target(self, fields: RecordFields, width: int | None = None) -> SparseTarget:
        """As a sparse target on the CPU; width: K, by default that of the widest position, at least 1.

        Kept ids come first in a row, then drawn ones, then empty slots. ValueError if a position has more than `width`.
        """
        used, size = self.kept + self.drawn, len(self)
        width = max(int(used.max(initial=1)), 1) if width is None else width
        if used.max(initial=0) > width:
            raise ValueError(f"position {int(used.argmax())} has {used.max()} ids, more than width = {width}")
        ids, weights = np.full((size, width), -1, dtype=np.int32), np.zeros((size, width), dtype=np.float32)
        for first, per_row, these, values in (
            (np.zeros_like(used), self.kept, self.kept_ids, self.kept_weights),
            (self.kept, self.drawn, self.drawn_ids, self.drawn_weights()),
        ):
            places = (np.arange(size) * width + first - (np.cumsum(per_row) - per_row)).repeat(per_row)
            places += np.arange(len(these))
            ids.reshape(-1)[places], weights.reshape(-1)[places] = these, values
        log_tail = None
        if fields.tail:
            with np.errstate(divide="ignore"):
                log_tail = torch.from_numpy(np.log(self.rest))
        return SparseTarget(
            ids=torch.from_numpy(ids),
            weights=torch.from_numpy(weights),
            log_tail=log_tail,
            label_log_prob=torch.from_numpy(self.label_log_prob),
            entropy=torch.from_numpy(self.entropy),
            unbiased=fields.draws != "none",
        )

    def drawn_weights(self) -> Array:
        """[M] float32: each drawn id's share of the rest of its position."""
        if self.counts is None:
            return (self.rest / np.maximum(self.drawn, 1)).repeat(self.drawn)
        rows = np.arange(len(self)).repeat(self.drawn)
        totals = np.bincount(rows, weights=self.counts, minlength=len(self))
        return (self.counts * (self.rest / np.maximum(totals, 1))[rows]).astype(np.float32)


def _array(tensor: Tensor) -> Array:
    """On the CPU; bfloat16 as its bits."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
