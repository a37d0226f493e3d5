"""What the loader yields and the models read. Shapes: B sequences, S tokens each, T = B * S."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of packed sequences, equal on all tensor-parallel ranks of a data rank.

    input_ids     [B, S] int64
    labels        [B, S] int64, already shifted: labels[b, s] is the token to be predicted at position s
    loss_mask     [B, S] float32, 1 where the position counts in the loss (0 at a document's last token)
    position_ids  [B, S] int64, restarting at 0 with every document; attention never crosses a restart
    sample_ids    [B] int64, key of each sequence in the (blended) token store; with the position in the
                  sequence it is the key of every cached record and of every random draw
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    sample_ids: Tensor

    @property
    def num_tokens(self) -> int:
        """T: all tokens, counted in the loss or not."""
        return self.input_ids.numel()

    def num_valid_tokens(self) -> Tensor:
        """Tokens counted in the loss, 0-d float64 on the batch's device. Does not synchronise."""
        return self.loss_mask.sum(dtype=torch.float64)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device (asynchronous from pinned memory)."""
        return self.map(lambda values: values.to(device, non_blocking=True))

    def rows(self, start: int, stop: int) -> Batch:
        """Sequences [start, stop) of this batch."""
        return self.map(lambda values: values[start:stop])

    def portions(self, max_tokens: int | None) -> list[Batch]:
        """Consecutive sequences, at most max_tokens tokens at a time but never less than one; None: all at once."""
        num_sequences, seq_len = self.input_ids.shape
        at_once = num_sequences if max_tokens is None else max(1, max_tokens // seq_len)
        return [self.rows(start, min(start + at_once, num_sequences)) for start in range(0, num_sequences, at_once)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """change(field) of every field."""
        return Batch(*(change(getattr(self, f.name)) for f in fields(self)))
