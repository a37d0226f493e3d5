"""The batch that models read, and the interface of what yields batches. B sequences, S tokens each, T = B * S."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kdtrain.documents import Documents


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of packed sequences, equal on all tensor-parallel ranks of a data rank.

    input_ids     [B, S] int64
    labels        [B, S] int64, already shifted: labels[b, s] is the token to be predicted at position s
    loss_mask     [B, S] float32, 1 where the position counts in the loss (0 at a document's last token)
    position_ids  [B, S] int64, restarting at 0 with every document; attention never crosses a restart
    sample_ids    [B] int64, 64-bit key of each sequence: its token store, the rule it was cut by and its number
                  (`kdtrain.stores.keys`); with the position in the sequence it is the key of every cached record
                  and of every random draw
    documents     those of the whole sequences, also where this rank holds parts of them; None: computed from the
                  position_ids where they are needed, which synchronises the device
    host          the batch in host memory that this one was copied from; None: unknown
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    sample_ids: Tensor
    documents: Documents | None = None
    host: Batch | None = None

    @classmethod
    def cat(cls, batches: Sequence[Batch]) -> Batch:
        """The sequences of all, in order; their documents, if all are known."""
        known = [batch.documents for batch in batches if batch.documents is not None]
        ids, labels, mask, positions, keys = (
            torch.cat(same) for same in zip(*(batch.tensors() for batch in batches), strict=True)
        )
        documents = Documents.cat(known) if len(known) == len(batches) else None
        return cls(ids, labels, mask, positions, keys, documents)

    @property
    def num_tokens(self) -> int:
        """T: all tokens, counted in the loss or not."""
        return self.input_ids.numel()

    def num_valid_tokens(self) -> Tensor:
        """Tokens counted in the loss, 0-d float64 on the batch's device. Does not synchronise."""
        return self.loss_mask.sum(dtype=torch.float64)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; `host` is this one if it is on the host.

        Asynchronous from pinned memory. A copy to the host waits, since its values may be read at once.
        """
        is_host = self.input_ids.is_cpu
        moved = self.map(lambda values: values.to(device, non_blocking=is_host))
        documents = None if self.documents is None else self.documents.to(device)
        return replace(moved, documents=documents, host=self if is_host else self.host)

    def on_host(self) -> Batch:
        """This batch in host memory: itself, or `host`; if that is unknown a copy, which synchronises the device."""
        if self.input_ids.is_cpu:
            return self
        return self.to("cpu") if self.host is None else self.host

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory, from which copies to a CUDA device are asynchronous. Needs such a device."""
        pinned = self.map(Tensor.pin_memory)
        return replace(pinned, documents=None if self.documents is None else self.documents.pin_memory())

    def rows(self, start: int, stop: int) -> Batch:
        """Sequences [start, stop) of this batch."""
        part = self.map(lambda values: values[start:stop])
        return replace(part, documents=None if self.documents is None else self.documents.sequences(start, stop))

    def portions(self, max_tokens: int | None) -> list[Batch]:
        """Consecutive sequences, at most max_tokens tokens at a time but never less than one; None: all at once."""
        num_sequences, seq_len = self.input_ids.shape
        at_once = num_sequences if max_tokens is None else max(1, max_tokens // seq_len)
        if at_once >= num_sequences:
            return [self]
        return [self.rows(start, min(start + at_once, num_sequences)) for start in range(0, num_sequences, at_once)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A batch with change(tensor) of every tensor; its `documents` and `host` are None."""
        ids, labels, mask, positions, keys = (change(values) for values in self.tensors())
        return Batch(ids, labels, mask, positions, keys)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every field that is a tensor, in order."""
        return self.input_ids, self.labels, self.loss_mask, self.position_ids, self.sample_ids

    def memory(self) -> tuple[Tensor, ...]:
        """Every tensor that a forward pass may read: the fields, and the documents' offsets where they are known."""
        return self.tensors() if self.documents is None else (*self.tensors(), self.documents.offsets)


class BatchSource(Protocol):
    """Which tokens a run trains on: an iterator over optimizer steps, whose position a checkpoint can hold."""

    def __next__(self) -> list[Batch]:
        """This data rank's micro-batches of the next step, in host memory; the same number on all data ranks."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the steps returned so far, and what the order depends on; JSON-able, equal on all ranks.

        The trainer calls it before each step, so it must be cheap.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the steps of `state`, in any layout. Raises StoreMismatch if it is of another order."""
