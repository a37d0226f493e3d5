"""Row kernels in torch: statistics and gradients of rows of logits that lie in a slab, a few rows at a time.

C rows of a chunk, n columns: the real tokens among this rank's vocabulary rows (padding never reaches a slab; n may
be 0). Slabs are float32 or float64. Logits are raw (before temperature). No function communicates; statistics of
several ranks are put together by `merge_stats` and the callers' collectives.

Rows are worked on in blocks that fit a cache, so every temporary is small and each slab is read from memory about
once per kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdtrain_kernels.divergences import DivergenceSpec, phi_of, q_phi_prime_of

CPU_BLOCK = 1 << 17
"""Elements of a block on the CPU: a handful of such temporaries stays in the second-level cache."""
DEVICE_BLOCK = 1 << 24
"""Elements of a block elsewhere: few launches, and at most 64 MiB per temporary."""

ROW_STATS = 4
"""Columns of `row_stats`: max, sum exp((s - max)/tau), sum exp(s - max), label's logit."""
PAIR_STATS = 2 * ROW_STATS + 1
"""Columns of `pair_stats`: the student's row_stats, the teacher's, and one sum that couples them."""


def row_blocks(slab: Tensor) -> Iterator[slice]:
    """Consecutive blocks of rows of a [C, n] slab."""
    num_rows, columns = slab.shape
    limit = CPU_BLOCK if slab.device.type == "cpu" else DEVICE_BLOCK
    step = max(1, limit // max(1, columns))
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def apply_head_(logits: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
    """logits <- softcap * tanh(logit_scale * (logits + bias) / softcap), in place. bias [n] or None."""
    if bias is not None:
        logits += bias
    if logit_scale != 1.0:
        logits *= logit_scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def row_stats(slab: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """[C, ROW_STATS] statistics of one model's rows.

    labels [C] int64: column of the label on this rank, -1 where another rank (or none) owns it; its logit is then 0.
    A rank without columns has max -inf and sums 0.
    """
    stats = slab.new_zeros(slab.shape[0], ROW_STATS)
    if slab.shape[1] == 0:
        stats[:, 0] = float("-inf")
        return stats
    for rows in row_blocks(slab):
        block = slab[rows]
        peak = block.amax(1, keepdim=True)
        shifted = block - _finite(peak)
        stats[rows, 0] = peak[:, 0]
        if temperature != 1.0:
            stats[rows, 1] = (shifted / temperature).exp_().sum(1)
        stats[rows, 2] = shifted.exp_().sum(1)
        if temperature == 1.0:
            stats[rows, 1] = stats[rows, 2]
    owned = labels >= 0
    picked = slab.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    stats[:, 3] = picked.where(owned, 0.0)
    return stats


def pair_stats(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, spec: DivergenceSpec) -> Tensor:
    """[C, PAIR_STATS]: row_stats of both models, and the coupling sum of divergences whose Z is known after one round.

    reverse_kl: sum exp(x - max x) ((x - max x) - (y - max y)) over this rank; logit_mse: sum (x - y); else 0.
    """
    stats = torch.cat(
        [row_stats(student, labels, temperature), row_stats(teacher, labels, temperature), student.new_zeros(len(student), 1)], 1
    )
    if student.shape[1] == 0 or spec.name not in ("reverse_kl", "logit_mse"):
        return stats
    for rows in row_blocks(student):
        x, y = student[rows] / temperature, teacher[rows] / temperature
        if spec.name == "logit_mse":
            stats[rows, -1] = x.sub_(y).sum(1)
        else:
            x -= stats[rows, 0, None] / temperature
            y -= stats[rows, ROW_STATS, None] / temperature
            weight = x.exp()
            stats[rows, -1] = weight.mul_(x.sub_(y)).sum(1)
    return stats


@dataclass(frozen=True, slots=True)
class RowTotals:
    """One model's row_stats over the whole vocabulary. All [C].

    lse: log sum exp(s / temperature); lse_1: log sum exp(s); label: the label's logit (0 if no rank owns it).
    """

    lse: Tensor
    lse_1: Tensor
    label: Tensor


def merge_stats(gathered: Tensor, temperature: float) -> RowTotals:
    """[ranks, C, ROW_STATS] in rank order -> totals, by the same arithmetic on every rank (bitwise equal)."""
    peak = gathered[:, :, 0].amax(0)
    safe = _finite(peak)
    behind = torch.where(gathered[:, :, 0] == peak, 0.0, gathered[:, :, 0] - safe)
    sum_1 = (gathered[:, :, 2] * behind.exp()).sum(0)
    lse_1 = safe + sum_1.log()
    if temperature == 1.0:
        lse = lse_1
    else:
        lse = safe / temperature + (gathered[:, :, 1] * (behind / temperature).exp()).sum(0).log()
    return RowTotals(lse, lse_1, gathered[:, :, 3].sum(0))


def merge_coupling(
    gathered: Tensor, student: RowTotals, teacher: RowTotals, temperature: float, spec: DivergenceSpec
) -> Tensor:
    """[ranks, C, PAIR_STATS] -> Z [C] for divergences that need no second round.

    forward_kl: -1. reverse_kl: sum q (log q - log p). logit_mse: mean over the vocabulary of x - y.
    """
    coupling = gathered[:, :, -1]
    if spec.name == "logit_mse":
        return coupling.sum(0) / spec.vocab_size
    if spec.name == "forward_kl":
        return torch.full_like(student.lse, -1.0)
    # Each rank measured from its own maxima; differences of numbers of like size bring them to the common normalisers.
    offset_s = gathered[:, :, 0] / temperature - student.lse
    offset_t = gathered[:, :, ROW_STATS] / temperature - teacher.lse
    empty = torch.isinf(gathered[:, :, 0])
    part = coupling + gathered[:, :, 1] * (offset_s - offset_t)
    return (offset_s.exp() * part).masked_fill(empty, 0.0).sum(0)


def pair_round2(
    student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor, temperature: float, spec: DivergenceSpec
) -> Tensor:
    """This rank's part of Z = sum q phi' [C], for divergences that need the normalisers first."""
    part = lse_s.new_zeros(len(student))
    for rows in row_blocks(student):
        lq, lp = _log_pair(student, teacher, rows, lse_s, lse_t, temperature)
        part[rows] = q_phi_prime_of(spec, lp, lq, lp.exp(), lq.exp()).sum(1)
    return part


@dataclass(frozen=True, slots=True)
class GradInputs:
    """What turns logits into gradients, per row [C]: normalisers, Z, weights and the label's column (-1: not here).

    logit_mse compares logits themselves: its lse_s and lse_t are 0.
    """

    lse_s: Tensor
    lse_s_1: Tensor
    lse_t: Tensor
    z: Tensor
    kd_weight: Tensor
    ce_weight: Tensor
    labels: Tensor


def row_grad_(slab: Tensor, lse_1: Tensor, ce_weight: Tensor, labels: Tensor) -> Tensor:
    """slab <- ce_weight * (softmax(s) - onehot(label)), in place: the gradient of weighted cross-entropy."""
    for rows in row_blocks(slab):
        slab[rows].sub_(lse_1[rows, None]).exp_().mul_(ce_weight[rows, None])
    _subtract_at_labels_(slab, ce_weight, labels)
    return slab


def pair_grad_(student: Tensor, teacher: Tensor, inputs: GradInputs, temperature: float, spec: DivergenceSpec) -> Tensor:
    """student <- d loss / d s for loss = sum kd_weight tau^2 D + ce_weight CE; teacher is spoilt. Returns D's part [C].

    The cross-entropy term is computed exactly as `row_grad_` does and the divergence added to it, so that with
    kd_weight 0 the result is bitwise the cross-entropy's.
    """
    divergence = inputs.lse_s.new_zeros(len(student))
    for rows in row_blocks(student):
        lq, lp = _log_pair(student, teacher, rows, inputs.lse_s, inputs.lse_t, temperature)
        slope, divergence[rows] = _slope(lp, lq, inputs.z[rows], spec)
        block = student[rows]
        block.sub_(inputs.lse_s_1[rows, None]).exp_().mul_(inputs.ce_weight[rows, None])
        # d x / d s = 1/tau and the loss carries tau^2: one tau remains
        block.add_(slope.mul_(temperature * inputs.kd_weight[rows, None]))
    _subtract_at_labels_(student, inputs.ce_weight, inputs.labels)
    return divergence


def pair_divergence(
    student: Tensor, teacher: Tensor, inputs: GradInputs, temperature: float, spec: DivergenceSpec
) -> Tensor:
    """D's part on this rank [C], when no gradient is wanted."""
    divergence = inputs.lse_s.new_zeros(len(student))
    for rows in row_blocks(student):
        lq, lp = _log_pair(student, teacher, rows, inputs.lse_s, inputs.lse_t, temperature)
        _, divergence[rows] = _slope(lp, lq, inputs.z[rows], spec)
    return divergence


def _slope(lp: Tensor, lq: Tensor, z: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    """(dD/dx [rows, n], D's part [rows]); lp and lq may be spoilt. For logit_mse they are y and x, and z their mean gap."""
    if spec.name == "logit_mse":
        gap = lq.sub_(lp).sub_(z[:, None])
        return gap * (2.0 / spec.vocab_size), gap.square().sum(1) / spec.vocab_size
    p, q = lp.exp(), lq.exp()
    if spec.name == "forward_kl":  # the common case without further temporaries
        slope = q - p
        value = lp.sub_(lq).mul_(p).sum(1) + slope.sum(1)
        return slope, value
    value = phi_of(spec, lp, lq, p, q).sum(1)
    return q_phi_prime_of(spec, lp, lq, p, q).sub_(q.mul_(z[:, None])), value


def pair_measure(
    student: Tensor, teacher: Tensor, student_totals: RowTotals, teacher_totals: RowTotals, temperature: float
) -> Tensor:
    """[C, 4] this rank's parts of: student entropy, teacher entropy (at temperature), forward KL at temperature 1, TVD."""
    parts = student.new_zeros(len(student), 4)
    for rows in row_blocks(student):
        lq, lp = _log_pair(student, teacher, rows, student_totals.lse, teacher_totals.lse, temperature)
        q, p = lq.exp(), lp.exp()
        parts[rows, 0] = -(q * lq).sum(1)
        parts[rows, 1] = -(p * lp).sum(1)
        parts[rows, 3] = 0.5 * (p - q).abs().sum(1)
        if temperature != 1.0:
            lq = student[rows] - student_totals.lse_1[rows, None]
            lp = teacher[rows] - teacher_totals.lse_1[rows, None]
            q, p = lq.exp(), lp.exp()
        parts[rows, 2] = (p * (lp - lq) - p + q).sum(1)
    return parts


def first_argmax(slab: Tensor) -> Tensor:
    """[C, 2]: the largest logit of each row and the smallest column that holds it (-inf and 0 without columns)."""
    found = slab.new_zeros(len(slab), 2)
    if slab.shape[1] == 0:
        found[:, 0] = float("-inf")
        return found
    columns = torch.arange(slab.shape[1], device=slab.device)
    for rows in row_blocks(slab):
        peak = slab[rows].amax(1)
        found[rows, 0] = peak
        found[rows, 1] = columns.where(slab[rows] == peak[:, None], slab.shape[1]).amin(1).to(slab.dtype)
    return found


def head_slope_(gradient: Tensor, logits_squared_ratio: Tensor | None, logit_scale: float) -> Tensor:
    """gradient <- gradient * d logits / d product; logits_squared_ratio = (s / softcap)^2, or None without a cap."""
    if logits_squared_ratio is not None:
        gradient.mul_(logits_squared_ratio.neg_().add_(1.0))
    if logit_scale != 1.0:
        gradient.mul_(logit_scale)
    return gradient


def _log_pair(
    student: Tensor, teacher: Tensor, rows: slice, lse_s: Tensor, lse_t: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log q, log p) of a block as new tensors."""
    if temperature == 1.0:
        return student[rows] - lse_s[rows, None], teacher[rows] - lse_t[rows, None]
    return (
        (student[rows] / temperature).sub_(lse_s[rows, None]),
        (teacher[rows] / temperature).sub_(lse_t[rows, None]),
    )


def _subtract_at_labels_(slab: Tensor, weight: Tensor, labels: Tensor) -> None:
    if slab.shape[1] == 0:
        return
    owned = labels >= 0
    slab.scatter_add_(1, labels.clamp(min=0)[:, None], -weight.where(owned, 0.0)[:, None])


def _finite(peak: Tensor) -> Tensor:
    """-inf maxima (nothing but masked columns) as 0, so that differences stay defined."""
    return peak.masked_fill(torch.isneginf(peak), 0.0)
