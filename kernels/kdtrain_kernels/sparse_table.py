"""Divergences from a teacher that is known at K ids only, on a table of K + 1 entries per row.

The student's probability outside the ids is one entry more, the bucket. With x = logits / temperature, x_k at the ids
and X = log sum exp of x outside them, the student's distribution on the table is softmax(x_1 .. x_K, X), so a
divergence's value and slopes on the table follow from `DivergenceSpec.terms`, and the gradient at a column
outside the ids is the bucket's times exp(x_v - X). Derivation: docs/design/0007-sparse-loss.md.

C rows of a chunk. Everything is computed in float64 on C x (K + 1) numbers, a few rows at a time; nothing communicates.
All backends share this module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdtrain_kernels.blocks import FLOOR, PairBlock, Scratch, row_blocks
from kdtrain_kernels.divergences import DivergenceSpec
from kdtrain_kernels.torch_rows import ROW_STATS, LogitMap, RowTotals, RowWeights, merge_stats


@dataclass(frozen=True, slots=True)
class SparseRows:
    """The teacher's side of a chunk.

    weights [C, K], 0 in empty slots. log_tail [C], log of the teacher's probability outside the ids, or None: 0 there.
    entropy [C], or None: if given, the value is the cross-entropy under the weights minus it (forward_kl only).
    conditional: both sides are renormalised on the ids, without the bucket.
    """

    weights: Tensor
    log_tail: Tensor | None
    entropy: Tensor | None
    conditional: bool


@dataclass(frozen=True, slots=True)
class SparseTotals:
    """A chunk's student statistics over the whole vocabulary, float64.

    tail: `RowTotals` of the columns outside the ids (log sums -inf if there are none; its label is the label's logit,
    whether or not the label is an id). logits [C, K]: raw logits at the ids, -inf in empty slots.
    """

    tail: RowTotals
    logits: Tensor

    def lse(self) -> Tensor:
        """[C] log sum exp of all logits at temperature 1."""
        return torch.logaddexp(self.tail.lse(), self.logits.logsumexp(1))


def merge_sparse_stats(gathered: Tensor, temperature: float) -> SparseTotals:
    """[ranks, C, ROW_STATS + K] of `sparse_stats`, in rank order -> totals, the same bits on every rank."""
    tail = merge_stats(gathered[:, :, :ROW_STATS].double(), temperature)
    return SparseTotals(tail, gathered[:, :, ROW_STATS:].amax(0).double())


@dataclass(frozen=True, slots=True)
class SparseTerms:
    """Value [C] of the divergence, and its slopes: dD/dx at the ids [C, K] and dD/dX of the bucket [C]."""

    value: Tensor
    at_ids: Tensor
    tail: Tensor


def sparse_terms(totals: SparseTotals, rows: SparseRows, spec: DivergenceSpec) -> SparseTerms:
    """The divergence of a chunk on its table.

    A row without any weight and without a tail has value 0 and slopes 0.
    """
    num_rows, width = rows.weights.shape
    value = torch.empty(num_rows, dtype=torch.float64, device=totals.logits.device)
    slopes = torch.empty(num_rows, width + 1, dtype=torch.float64, device=totals.logits.device)
    scratch = Scratch.of(slopes)
    for part in row_blocks(slopes, scratch):
        block = _table(totals, rows, part, spec.temperature, scratch)
        summed, slope = spec.terms(block)
        slopes[part] = slope.addcmul_(block.q(), slope.sum(1, keepdim=True), value=-1)
        if rows.entropy is not None:
            summed = -block.log_q().mul_(block.p()).sum(1) - rows.entropy[part].double()
        value[part] = summed
    if rows.log_tail is not None or rows.conditional:
        value.clamp_(min=0.0)  # both sides sum to 1, so a negative value is rounding error
    if rows.log_tail is None:
        silent = ~(rows.weights > 0).any(1)
        value.masked_fill_(silent, 0.0)
        slopes.masked_fill_(silent[:, None], 0.0)
    return SparseTerms(value, slopes[:, :-1], slopes[:, -1])


def _table(totals: SparseTotals, rows: SparseRows, part: slice, temperature: float, scratch: Scratch) -> PairBlock:
    """Both sides of some rows, the bucket last. Entries without probability are set to FLOOR."""
    logits, tail = totals.logits[part], totals.tail
    x, y = scratch.take(0, len(logits)), scratch.take(1, len(logits))
    peak = logits.amax(1)
    if not rows.conditional:
        peak = torch.maximum(peak, tail.peak[part].where(tail.log_sum[part].isfinite(), float("-inf")))
    peak = peak.masked_fill(peak.isneginf(), 0.0)
    torch.sub(logits, peak[:, None], out=x[:, :-1]).div_(temperature)
    y[:, :-1] = rows.weights[part].double().log()
    x[:, -1] = FLOOR if rows.conditional else (tail.peak[part] - peak) / temperature + tail.log_sum[part]
    y[:, -1] = FLOOR if rows.conditional or rows.log_tail is None else rows.log_tail[part].double()
    x.clamp_(min=FLOOR)
    y.clamp_(min=FLOOR)
    log_sum_t = y.logsumexp(1) if rows.conditional else torch.zeros_like(peak)
    return PairBlock(x, y, x.logsumexp(1), log_sum_t, x.shape[1], scratch)


@dataclass(frozen=True, slots=True)
class SparseGradient:
    """Inputs of `sparse_grad`, for loss = sum kd * temperature^2 * D + ce * CE + z * lse^2. All float64.

    at_ids [C, K]: d loss / d product at the ids, complete. Elsewhere d loss / d logit is
    tail * exp((s - peak) / temperature) + softmax * exp(s - peak), minus ce [C] at the label, with peak [C] the largest
    logit outside the ids.
    """

    at_ids: Tensor
    tail: Tensor
    softmax: Tensor
    ce: Tensor
    peak: Tensor


def sparse_gradient(
    totals: SparseTotals,
    terms: SparseTerms,
    weights: RowWeights,
    columns: Tensor,
    temperature: float,
    *,
    logit_map: LogitMap,
) -> SparseGradient:
    """Combine the terms. columns [C, K]: the ids' columns on this rank, -1 where another rank owns them.

    Rows of kd weight 0 get the gradient of cross-entropy, even if the teacher's side is not finite.
    """
    counts = weights.kd != 0
    kd = weights.kd * temperature  # dx/ds = 1 / temperature, and the loss carries temperature^2
    lse, tail_sum = totals.lse(), totals.tail.log_sum.exp()
    tail = (kd * terms.tail / tail_sum).where(counts & (tail_sum > 0), 0.0)
    softmax = (weights.softmax * torch.exp(totals.tail.peak - lse)).where(tail_sum > 0, 0.0)
    logits = totals.logits.masked_fill(totals.logits.isneginf(), 0.0)
    at_ids = (kd[:, None] * terms.at_ids).where(counts[:, None], 0.0)
    at_ids += weights.softmax[:, None] * torch.exp(totals.logits - lse[:, None])
    is_label = (columns == weights.labels[:, None]) & (columns >= 0)
    at_ids -= weights.ce[:, None].where(is_label, 0.0)
    slope = logit_map.slope(logits, torch.empty_like(logits))
    if slope is not None:
        at_ids *= slope
    return SparseGradient(at_ids, tail, softmax, weights.ce, totals.tail.peak)
