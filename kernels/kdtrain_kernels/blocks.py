"""Process a few rows of both models' logits at a time, in buffers that stay in cache and are reused for every block.

b rows of a block, n columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

CPU_BLOCK = 1 << 17
"""Elements of a block on the CPU: several such buffers fit the second-level cache."""
DEVICE_BLOCK = 1 << 22
"""Elements of a block elsewhere: few launches, 16 MiB per float32 buffer."""

FLOOR = -1e4
"""Shifted logits below this value are clamped to it. A token masked to -inf keeps probability 0 in float32 and float64,
and no difference of logarithms becomes inf - inf. If one model masks a token and the other does not, a divergence that
is infinite comes out as about 1e4 times the other's probability."""


@dataclass(slots=True)
class Scratch:
    """Buffers of one [block rows, n] shape, made on first use."""

    rows: int
    like: Tensor
    buffers: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, slab: Tensor) -> Scratch:
        """For blocks of a [C, n] slab (and of any slab of the same columns)."""
        return cls(max(1, min(slab.shape[0], block_rows(slab))), slab)

    def take(self, index: int, rows: int) -> Tensor:
        """An uninitialised buffer [rows, n]."""
        if index not in self.buffers:
            self.buffers[index] = self.like.new_empty(self.rows, self.like.shape[1])
        return self.buffers[index][:rows]


def block_rows(slab: Tensor) -> int:
    """Rows of a block of a [C, n] slab."""
    limit = CPU_BLOCK if slab.device.type == "cpu" else DEVICE_BLOCK
    return max(1, limit // max(1, slab.shape[1]))


def row_blocks(slab: Tensor, scratch: Scratch) -> Iterator[slice]:
    """Consecutive blocks of rows of a [C, n] slab."""
    for first in range(0, slab.shape[0], scratch.rows):
        yield slice(first, min(first + scratch.rows, slab.shape[0]))


def shifted(logits: Tensor, peak: Tensor, temperature: float, out: Tensor) -> Tensor:
    """out = max((logits - peak) / temperature, FLOOR). logits [b, n]; peak [b] float64, exact in their dtype."""
    torch.sub(logits, peak.to(logits.dtype)[:, None], out=out)
    if temperature != 1.0:
        out.div_(temperature)
    return out.clamp_(min=FLOOR)


@dataclass(slots=True)
class PairBlock:
    """Both models' logits of b rows, each shifted by its row's maximum and divided by the temperature.

    x, y [b, n]: student's and teacher's; log_sum_s, log_sum_t [b] float64: log sum exp of x and y over the whole
    vocabulary, which has vocab_size tokens. Every method fills a buffer of its own and returns it; the caller may
    overwrite it and call the method again.
    """

    x: Tensor
    y: Tensor
    log_sum_s: Tensor
    log_sum_t: Tensor
    vocab_size: int
    scratch: Scratch

    def _column(self, values: Tensor) -> Tensor:
        return values.to(self.x.dtype)[:, None]

    def q(self) -> Tensor:
        """Student probabilities."""
        return torch.exp(self.x, out=self.scratch.take(2, len(self.x))).mul_(self._column(torch.exp(-self.log_sum_s)))

    def p(self) -> Tensor:
        """Teacher probabilities."""
        return torch.exp(self.y, out=self.scratch.take(3, len(self.x))).mul_(self._column(torch.exp(-self.log_sum_t)))

    def log_ratio(self) -> Tensor:
        """d = log p - log q: a difference of differences, so that a common offset of the logits costs no digits."""
        d = torch.sub(self.y, self.x, out=self.scratch.take(4, len(self.x)))
        return d.sub_(self._column(self.log_sum_t - self.log_sum_s))

    def log_q(self) -> Tensor:
        """Student log-probabilities."""
        return torch.sub(self.x, self._column(self.log_sum_s), out=self.scratch.take(5, len(self.x)))

    def log_p(self) -> Tensor:
        """Teacher log-probabilities."""
        return torch.sub(self.y, self._column(self.log_sum_t), out=self.scratch.take(5, len(self.x)))

    def spare(self, index: int = 0) -> Tensor:
        """Buffers for use by the caller."""
        return self.scratch.take(6 + index, len(self.x))


def finite(peak: Tensor) -> Tensor:
    """Replace -inf maxima (rows with masked columns only) by 0, so that differences stay defined."""
    return peak.masked_fill(torch.isneginf(peak), 0.0)


def front_of_rows(slab: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, n] of `dtype` over the front of each row's memory of a [C, n] slab; the slab itself if it has that dtype.

    A narrower dtype keeps the row stride in bytes; row i may be written once row i of the slab has been read.
    """
    if dtype == slab.dtype:
        return slab
    num_rows, columns = slab.shape
    whole = slab.as_strided((num_rows, slab.stride(0)), (slab.stride(0), 1))
    return whole.view(dtype)[:, :columns]
