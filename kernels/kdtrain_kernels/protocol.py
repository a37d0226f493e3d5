"""What a module of row kernels has: three interfaces, each satisfied by a module in torch and one in Triton.

Shapes, meaning and errors are in the docstrings of `torch_rows`, `sparse_rows` and `topk_rows`, whose functions have
these names. No function communicates.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.divergences import DivergenceSpec
from kdtrain_kernels.sparse_table import SparseGradient
from kdtrain_kernels.topk_rows import Merged, Selection
from kdtrain_kernels.torch_rows import LogitMap, PairTotals, RowTotals, RowWeights


class RowKernels(Protocol):
    """Rows of one or of two models' logits: `torch_rows`, `triton.rows`."""

    def row_stats(self, slab: Tensor, labels: Tensor, temperature: float, scratch: Scratch) -> Tensor:
        """[C, ROW_STATS] statistics of one model's rows."""

    def merge_stats(self, gathered: Tensor, temperature: float) -> RowTotals:
        """All ranks' row_stats -> totals."""

    def row_grad(
        self,
        slab: Tensor,
        totals: RowTotals,
        weights: RowWeights,
        *,
        logit_map: LogitMap,
        scratch: Scratch,
        operand_dtype: torch.dtype,
    ) -> Tensor:
        """Gradient [C, n] of the cross-entropy, in the slab's memory."""

    def pair_stats(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, spec: DivergenceSpec, scratch: Scratch
    ) -> Tensor:
        """[C, PAIR_STATS] statistics of both models' rows."""

    def merge_pair_stats(self, gathered: Tensor, spec: DivergenceSpec, vocab_size: int) -> PairTotals:
        """All ranks' pair_stats -> totals."""

    def pair_round2(
        self, student: Tensor, teacher: Tensor, totals: PairTotals, *, spec: DivergenceSpec, scratch: Scratch
    ) -> Tensor:
        """[C, 2] this rank's parts of Z and of the divergence, for divergences of two rounds."""

    def pair_value(
        self, student: Tensor, teacher: Tensor, totals: PairTotals, *, spec: DivergenceSpec, scratch: Scratch
    ) -> Tensor:
        """[C] this rank's part of the divergence, for divergences of one round."""

    def pair_grad(
        self,
        student: Tensor,
        teacher: Tensor,
        totals: PairTotals,
        weights: RowWeights,
        *,
        spec: DivergenceSpec,
        logit_map: LogitMap,
        scratch: Scratch,
        operand_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """(this rank's part of a one-round divergence [C], gradient [C, n] in the student's slab)."""

    def pair_measure(
        self, student: Tensor, teacher: Tensor, totals: PairTotals, temperature: float, *, scratch: Scratch
    ) -> Tensor:
        """[C, 4] this rank's parts of measured values."""

    def first_argmax(self, slab: Tensor, scratch: Scratch) -> Tensor:
        """[C, 2] each row's largest logit and its first column."""


class SparseKernels(Protocol):
    """Rows of logits with K ids apart from the rest: `sparse_rows`, `triton.sparse`."""

    def sparse_stats(
        self, slab: Tensor, columns: Tensor, labels: Tensor, temperature: float, scratch: Scratch
    ) -> Tensor:
        """[C, ROW_STATS + K] statistics without the ids, and the logits at the ids."""

    def sparse_grad(
        self,
        slab: Tensor,
        columns: Tensor,
        labels: Tensor,
        gradient: SparseGradient,
        temperature: float,
        *,
        logit_map: LogitMap,
        scratch: Scratch,
        operand_dtype: torch.dtype,
    ) -> Tensor:
        """Gradient [C, n], in the slab's memory."""


class TopKKernels(Protocol):
    """The first k entries of rows of logits, and draws from the rest: `topk_rows`, `triton.topk`."""

    def topk_select(
        self, slab: Tensor, k: int, temperatures: tuple[float, ...], *, entropy: bool, scratch: Scratch
    ) -> Selection:
        """This rank's first k entries of each row, and sums over the others."""

    def topk_merge(
        self, values: Tensor, ids: Tensor, stats: Tensor, k: int, temperatures: tuple[float, ...], *, entropy: bool
    ) -> Merged:
        """All ranks' selections -> the first k of their entries."""

    def restore(self, slab: Tensor, selection: Selection, keep: Tensor) -> None:
        """Write selected entries back into the slab."""

    def tail_cdf(self, slab: Tensor, peak: Tensor, temperature: float, *, scratch: Scratch) -> Tensor:
        """[C, lanes] running sums of the probabilities that are left in the slab."""

    def tail_sample(self, slab: Tensor, cdf: Tensor, targets: Tensor, peak: Tensor, temperature: float) -> Tensor:
        """[C, m] columns at which the distribution function reaches its targets."""
