"""Arithmetic of a vocabulary sharded over tensor-parallel ranks, and the head of a loss.

Shape letters: V vocabulary, v rows of the vocabulary on this rank, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROW_MULTIPLE = 128
"""Shards are padded to a multiple of this many rows, so that matrix products keep aligned shapes."""


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The slice [start, stop) of the vocabulary on one tensor-parallel rank.

    Rows at or past `vocab_size` (number of ids in the softmax, usually the tokenizer's size) are padding, so that every
    rank holds the same number of rows; they are in no softmax and receive no gradient. A plain value: nothing
    communicates. Raises ValueError when it is made from numbers that contradict each other.
    """

    start: int
    stop: int
    vocab_size: int
    tp_rank: int = 0
    tp_size: int = 1
    """Index in, and size of, the group whose ranks hold the other slices."""

    def __post_init__(self) -> None:
        if not (0 <= self.start < self.stop and self.vocab_size >= 1 and 0 <= self.tp_rank < self.tp_size):
            raise ValueError(
                f"{self} is not a slice of a vocabulary: need 0 <= start < stop and tp_rank in [0, tp_size)"
            )
        if self.vocab_size > self.rows * self.tp_size:
            raise ValueError(f"{self}: {self.tp_size} shards of {self.rows} rows cannot hold {self.vocab_size} tokens")

    @classmethod
    def of(
        cls,
        vocab_size: int,
        tp_rank: int = 0,
        tp_size: int = 1,
        *,
        total_rows: int | None = None,
        multiple: int = ROW_MULTIPLE,
    ) -> VocabShard:
        """The shard of `tp_rank`.

        `total_rows` (default `vocab_size`) is the number of rows that the shards must hold: a Hugging Face head may
        have more rows than the tokenizer has tokens. multiple: every shard's rows are a multiple of it. Raises
        ValueError on impossible arguments.
        """
        total = vocab_size if total_rows is None else total_rows
        if vocab_size < 1 or total < vocab_size or multiple < 1:
            raise ValueError(f"need 1 <= vocab_size <= total_rows, got {vocab_size=} {total_rows=} {multiple=}")
        if not 0 <= tp_rank < tp_size:
            raise ValueError(f"tp_rank={tp_rank} is not in [0, {tp_size})")
        rows = -(-total // tp_size)
        rows = -(-rows // multiple) * multiple
        return cls(tp_rank * rows, (tp_rank + 1) * rows, vocab_size, tp_rank, tp_size)

    @property
    def rows(self) -> int:
        """Rows held on this rank, padding included."""
        return self.stop - self.start

    @property
    def valid_rows(self) -> int:
        """Rows of real tokens; 0 on a rank that holds only padding."""
        return min(self.stop, self.vocab_size) - min(self.start, self.vocab_size)


@dataclass(frozen=True, slots=True)
class HeadShard:
    """This rank's rows of a language-model head, with the bias, scale and cap of the logits.

    logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap); softcap None means no cap.
    weight [v, D]; bias [v] or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
