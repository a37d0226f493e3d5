"""Choose which documents share a call of attention, once per batch, from their lengths on the host.

T: tokens of all sequences, concatenated.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from kdtrain.documents import Documents

SHORT = 128
"""A run of documents with at least this many tokens gets a call of its own; gathering shorter ones saves calls but
costs copies."""

FEW = 4
"""Fewer short runs than this are not worth gathering."""

WASTE = 1.25
"""Longest document in a bucket, as a multiple of the shortest: at most a fifth of a bucket is padding."""


@dataclass(frozen=True, slots=True)
class Run:
    """`count` consecutive documents of `length` tokens; in a bucket some are padded to that length."""

    count: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of all documents of the run."""
        return self.count * self.length


@dataclass(frozen=True, slots=True)
class Layout:
    """A partition of T tokens into calls.

    stretches: in token order, either a run that is called in place, or a number of tokens of short documents; buckets:
    the short documents, shortest first, right-padded; there: int64 [slots of all buckets], index of the short
    documents' token in each slot; padding: bool [slots, 1, 1]; back: int64 [short tokens], the slot of each.
    """

    stretches: tuple[Run | int, ...]
    buckets: tuple[Run, ...]
    there: Tensor
    padding: Tensor
    back: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device | str = "cpu") -> Layout:
        """The layout for documents of these lengths; index tensors on `device`."""
        runs = [Run(len(list(same)), length) for length, same in groupby(lengths)]
        few = sum(run.tokens < SHORT for run in runs) < FEW
        stretches: list[Run | int] = []
        short: list[int] = []
        for run in runs:
            if few or run.tokens >= SHORT:
                stretches.append(run)
                continue
            short += [run.length] * run.count
            last = stretches.pop() if stretches and isinstance(stretches[-1], int) else 0
            stretches.append((last if isinstance(last, int) else 0) + run.tokens)
        buckets, there, padding, back = _buckets(short)
        # non_blocking: a blocking copy would wait for all work queued on the device
        tensors = (x.to(device, non_blocking=True) for x in (there, padding[:, None, None], back))
        return cls(tuple(stretches), buckets, *tensors)

    @property
    def sizes(self) -> list[int]:
        """Tokens of every stretch."""
        return [stretch if isinstance(stretch, int) else stretch.tokens for stretch in self.stretches]

    def gather(self, tokens: Tensor) -> Tensor:
        """[short tokens, H, d] -> [slots, H, d], zero where padded. Differentiable."""
        return cast(Tensor, _Gather.apply(tokens, self.there, self.padding, self.back))  # type: ignore[no-untyped-call]

    def scatter(self, slots: Tensor) -> Tensor:
        """The inverse: [slots, H, d] -> [short tokens, H, d]. Differentiable."""
        return cast(Tensor, _Scatter.apply(slots, self.there, self.padding, self.back))  # type: ignore[no-untyped-call]


class PackedDocuments:
    """The packing layout of one batch, made once and used by every layer of a forward pass."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents
        self._layouts: dict[torch.device, Layout] = {}
        self._bands: dict[tuple[Any, ...], Tensor] = {}

    def layout(self, device: torch.device) -> Layout:
        """The layout, its index tensors on `device`."""
        if device not in self._layouts:
            self._layouts[device] = Layout.of(self.documents.lengths, device)
        return self._layouts[device]

    def offsets(self, device: torch.device) -> Tensor:
        """int32 [documents + 1] on `device`: start of each document, then T."""
        if self.documents.offsets.device != device:
            self.documents = self.documents.to(device)
        return self.documents.offsets

    def band(self, rows: int, before: int, window: int, like: Tensor) -> Tensor:
        """[rows, before + rows] in the dtype and on the device of `like`, to be added to attention's logits.

        Query i is the token of column before + i. Zero in the `window` columns that end there, -inf elsewhere. Rows
        begin at multiples of 16 elements; torch's CUDA kernel copies any other mask on every call.
        """
        key = (rows, before, window, like.dtype, like.device)
        if key not in self._bands:
            columns = torch.arange(-(-(before + rows) // 16) * 16, device=like.device)
            behind = before + torch.arange(rows, device=like.device)[:, None] - columns
            band = torch.zeros(behind.shape, dtype=like.dtype, device=like.device)
            band.masked_fill_((behind < 0) | (behind >= window), -torch.inf)
            self._bands[key] = band[:, : before + rows]
        return self._bands[key]


def _buckets(lengths: list[int]) -> tuple[tuple[Run, ...], Tensor, Tensor, Tensor]:
    """(buckets, there, padding [slots], back) of documents of these lengths, one after the other."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups: list[list[int]] = []
    for number in order:
        if not groups or lengths[number] > WASTE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(number)
    buckets = tuple(Run(len(group), lengths[group[-1]]) for group in groups)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    begins = sizes.cumsum(0) - sizes
    places, real = [], []
    for group, bucket in zip(groups, buckets, strict=True):
        numbers, column = torch.tensor(group), torch.arange(bucket.length)
        inside = column < sizes[numbers][:, None]
        places.append(torch.where(inside, begins[numbers][:, None] + column, 0).flatten())
        real.append(inside.flatten())
    there = torch.cat(places) if places else torch.empty(0, dtype=torch.int64)
    slots = torch.cat(real) if real else torch.empty(0, dtype=torch.bool)
    back = torch.empty(int(sizes.sum()), dtype=torch.int64)
    back[there[slots]] = slots.nonzero().flatten()
    return buckets, there, ~slots, back


class _Gather(Function):
    """Every token has one slot, so the gradient is a gather too; that of padding is zero and dropped."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, there: Tensor, padding: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return tokens.index_select(0, there).masked_fill_(padding, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None, None


class _Scatter(Function):
    """The transpose of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, there: Tensor, padding: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, padding)
        return slots.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        there, padding = ctx.saved_tensors
        return grads[0].index_select(0, there).masked_fill_(padding, 0), None, None, None
