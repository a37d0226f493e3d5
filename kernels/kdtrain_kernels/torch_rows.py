"""Row kernels in torch: statistics, divergences and gradients of rows of logits that lie in a slab.

C rows of a chunk, n columns: the real tokens among this rank's vocabulary rows (padding never reaches a slab; n may
be 0). Slabs are float32 or float64 and hold raw logits, before temperature; their row stride may exceed n (the gap is
ignored). No function communicates: `merge_stats` merges the statistics of several ranks that the caller has gathered.
Numbers per row are float64, so that no precision is lost between the slab's arithmetic and the gradient.

Rows are processed a few at a time in buffers that fit a cache (`blocks.Scratch`); no copy of the slab is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdtrain_kernels.blocks import FLOOR, PairBlock, Scratch, finite, front_of_rows, row_blocks, shifted
from kdtrain_kernels.divergences import DivergenceSpec

ROW_STATS = 4
"""Columns of `row_stats`: max, sum exp((s - max) / temperature), sum exp(s - max), the label's logit."""
PAIR_STATS = 2 * ROW_STATS + 2
"""Columns of `pair_stats`: the student's row_stats, the teacher's, and two sums that couple them."""


@dataclass(frozen=True, slots=True)
class LogitMap:
    """The map from a head's products to its logits: s = softcap * tanh(logit_scale * product / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """Products -> logits, in place."""
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def slope(self, logits: Tensor, out: Tensor) -> Tensor | None:
        """d logits / d product from the logits, written to `out`; None if it is 1."""
        if self.softcap is None:
            return None if self.logit_scale == 1.0 else out.fill_(self.logit_scale)
        ratio = torch.div(logits, self.softcap, out=out)
        return ratio.square_().neg_().add_(1.0).mul_(self.logit_scale)


def row_stats(slab: Tensor, labels: Tensor, temperature: float, scratch: Scratch) -> Tensor:
    """[C, ROW_STATS] float64 statistics of one model's rows.

    labels [C] int64: column of the label on this rank, -1 where another rank (or none) owns it; its logit is then 0. If
    this rank has no column above -inf, the maximum is -inf and the sums are 0.
    """
    stats = torch.zeros(slab.shape[0], ROW_STATS, dtype=torch.float64, device=slab.device)
    if slab.shape[1] == 0:
        stats[:, 0] = float("-inf")
        return stats
    for rows in row_blocks(slab, scratch):
        block = slab[rows]
        peak = block.amax(1)
        x = torch.sub(block, finite(peak)[:, None], out=scratch.take(0, len(block)))
        stats[rows, 0] = peak.double()
        if temperature != 1.0:
            stats[rows, 1] = torch.div(x, temperature, out=scratch.take(1, len(block))).exp_().sum(1).double()
        stats[rows, 2] = x.exp_().sum(1).double()
    if temperature == 1.0:
        stats[:, 1] = stats[:, 2]
    picked = slab.gather(1, labels.clamp(min=0)[:, None])[:, 0].double()
    stats[:, 3] = picked.where(labels >= 0, 0.0)
    return stats


def pair_stats(student: Tensor, teacher: Tensor, labels: Tensor, *, spec: DivergenceSpec, scratch: Scratch) -> Tensor:
    """[C, PAIR_STATS] float64: row_stats of both models, and for reverse_kl the sums that give Z after one round:

    sum e^x (x - y), with x and y shifted by this rank's maxima and divided by the temperature; and sum e^x where y is
    FLOOR, because such y stay FLOOR after the shift to the maximum over all ranks.
    """
    temperature = spec.temperature
    of_s = row_stats(student, labels, temperature, scratch)
    of_t = row_stats(teacher, labels, temperature, scratch)
    coupling = of_s.new_zeros(len(student), 2)
    if spec.kernel == "reverse_kl":
        peak_s, peak_t = finite(of_s[:, 0]), finite(of_t[:, 0])
        for rows in row_blocks(student, scratch):
            x = shifted(student[rows], peak_s[rows], temperature, scratch.take(0, len(student[rows])))
            y = shifted(teacher[rows], peak_t[rows], temperature, scratch.take(1, len(x)))
            weight = torch.exp(x, out=scratch.take(2, len(x)))
            coupling[rows, 0] = x.sub_(y).mul_(weight).sum(1).double()
            coupling[rows, 1] = weight.mul_(y <= FLOOR).sum(1).double()
    return torch.cat([of_s, of_t, coupling], 1)


@dataclass(frozen=True, slots=True)
class RowTotals:
    """One model's statistics over the whole vocabulary. All [C] float64.

    peak: max s; log_sum: log sum exp((s - peak) / temperature); log_sum_1: the same at temperature 1; label: the
    label's logit (0 if no rank owns it).
    """

    peak: Tensor
    log_sum: Tensor
    log_sum_1: Tensor
    label: Tensor

    def lse(self) -> Tensor:
        """log sum exp s at temperature 1."""
        return self.peak + self.log_sum_1

    def label_nll(self) -> Tensor:
        """-log softmax(s)[label] at temperature 1, nats."""
        return self.log_sum_1 + (self.peak - self.label)


def merge_stats(gathered: Tensor, temperature: float) -> RowTotals:
    """[ranks, C, ROW_STATS] in rank order -> totals, computed alike on every rank (bitwise equal)."""
    peak, behind = _behind(gathered)
    log_sum_1 = (gathered[:, :, 2] * behind.exp()).sum(0).log()
    log_sum = log_sum_1
    if temperature != 1.0:
        log_sum = (gathered[:, :, 1] * (behind / temperature).exp()).sum(0).log()
    return RowTotals(peak, log_sum, log_sum_1, gathered[:, :, 3].sum(0))


@dataclass(frozen=True, slots=True)
class PairTotals:
    """Both models' totals of a chunk over a vocabulary of vocab_size tokens.

    z [C] float64: Z of the divergence, final once it is known.
    """

    student: RowTotals
    teacher: RowTotals
    z: Tensor
    vocab_size: int


def merge_pair_stats(gathered: Tensor, spec: DivergenceSpec, vocab_size: int) -> PairTotals:
    """[ranks, C, PAIR_STATS] -> totals. vocab_size: real tokens of the whole vocabulary.

    z is final for one-round divergences, 0 for two-round ones until their second round.
    """
    temperature = spec.temperature
    student = merge_stats(gathered[:, :, :ROW_STATS], temperature)
    teacher = merge_stats(gathered[:, :, ROW_STATS : 2 * ROW_STATS], temperature)
    if spec.kernel == "forward_kl":
        return PairTotals(student, teacher, torch.full_like(student.peak, -1.0), vocab_size)
    if spec.kernel != "reverse_kl":
        return PairTotals(student, teacher, torch.zeros_like(student.peak), vocab_size)
    # Each rank computed x - y relative to its own maxima; convert its sum to the global maxima.
    _, behind = _behind(gathered)
    offset_s = finite(gathered[:, :, 0]) - student.peak
    offset_t = finite(gathered[:, :, ROW_STATS]) - teacher.peak
    mass, floored = gathered[:, :, 1], gathered[:, :, -1]
    part = gathered[:, :, -2] + (mass * (offset_s - offset_t) + floored * offset_t) / temperature
    mean_gap = (part * (behind / temperature).exp()).sum(0) / student.log_sum.exp()
    return PairTotals(student, teacher, mean_gap + teacher.log_sum - student.log_sum, vocab_size)


@dataclass(frozen=True, slots=True)
class RowWeights:
    """Weights and label columns of a chunk.

    kd, ce [C] float64; labels [C] int64, -1 where not on this rank. softmax [C] float64: the factor of softmax(s) in
    the gradient, ce + 2 z lse for a loss with sum ce * CE + z * lse^2.
    """

    kd: Tensor
    ce: Tensor
    labels: Tensor
    softmax: Tensor


def row_grad(
    slab: Tensor,
    totals: RowTotals,
    weights: RowWeights,
    *,
    logit_map: LogitMap,
    scratch: Scratch,
    operand_dtype: torch.dtype,
) -> Tensor:
    """d loss / d product [C, n] for loss = sum ce * CE + z * lse^2, in the slab's memory. The kd weights are not read.

    In the slab's own dtype it is the slab; rounded to a narrower one, a view of the front of each of its rows.
    """
    operand = front_of_rows(slab, operand_dtype)
    for rows in row_blocks(slab, scratch):
        block = slab[rows]
        slope = logit_map.slope(block, scratch.take(0, len(block)))
        _weigh_ce(_softmax_(block, totals, rows), rows, weights, out=block)
        if slope is not None:
            block.mul_(slope)
        _store(block, operand[rows])
    return operand


def pair_round2(
    student: Tensor, teacher: Tensor, totals: PairTotals, *, spec: DivergenceSpec, scratch: Scratch
) -> Tensor:
    """[C, 2] float64: this rank's partial sums of Z and of D, for divergences that need the normalisers first.

    Leaves in the teacher's slab what `pair_grad` of the same backend reads there.
    """
    parts = torch.zeros(len(student), 2, dtype=torch.float64, device=student.device)
    for rows in row_blocks(student, scratch):
        block = _pair_block(student, teacher, rows, totals, spec.temperature, scratch, keep_teacher=False)
        value, slope = spec.terms(block)
        teacher[rows].copy_(slope)
        parts[rows, 0] = slope.sum(1).double()
        parts[rows, 1] = value.double()
    return parts


def pair_value(
    student: Tensor, teacher: Tensor, totals: PairTotals, *, spec: DivergenceSpec, scratch: Scratch
) -> Tensor:
    """[C] float64: this rank's partial sum of D, for one-round divergences when no gradient is needed."""
    value = torch.zeros(len(student), dtype=torch.float64, device=student.device)
    for rows in row_blocks(student, scratch):
        block = _pair_block(student, teacher, rows, totals, spec.temperature, scratch)
        value[rows] = spec.terms(block)[0].double()
    return value


def pair_grad(
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
    """(D's part, d loss / d product) for loss = sum kd * spec.temperature^2 * D + ce * CE + z * lse^2; overwrites both
    slabs.

    D's part [C] float64 for one-round divergences, 0 for the others (`pair_round2` returns it). The gradient [C, n]
    lies in the student's slab as `row_grad`'s does; the terms without kd are computed as there and the divergence is
    added, so that kd weight 0 gives the same bits, even where the divergence is not finite.
    """
    temperature, row = spec.temperature, spec.row
    operand = front_of_rows(student, operand_dtype)
    value = torch.zeros(len(student), dtype=torch.float64, device=student.device)
    # dx/ds = 1 / temperature and the loss carries temperature^2: one temperature remains
    kd = (weights.kd * temperature).to(student.dtype)
    unused = (kd == 0)[:, None]
    any_unused = unused.device.type != "cpu" or bool(unused.any())  # reading the condition would synchronise a device
    for rows in row_blocks(student, scratch):
        s, t = student[rows], teacher[rows]
        if row.two_rounds:
            slope, q = t, None
            if not row.uniform_baseline:
                q = _probabilities(s, totals.student, rows, temperature, scratch)
        else:
            block = _pair_block(student, teacher, rows, totals, temperature, scratch, keep_teacher=False)
            part, slope = spec.terms(block)
            value[rows] = part.double()
            q = block.q()
        z = totals.z[rows].to(s.dtype)[:, None]
        if q is None:
            slope.sub_(z / totals.vocab_size)
        else:
            slope.addcmul_(q, z, value=-1)
        if any_unused:
            slope.masked_fill_(unused[rows], 0.0)
        chain = logit_map.slope(s, scratch.take(0, len(s)))
        softmax = q if q is not None and temperature == 1.0 else _softmax_(s, totals.student, rows)
        _weigh_ce(softmax, rows, weights, out=s)
        s.addcmul_(slope, kd[rows, None])
        if chain is not None:
            s.mul_(chain)
        _store(s, operand[rows])
    return value, operand


def pair_measure(
    student: Tensor, teacher: Tensor, totals: PairTotals, temperature: float, *, scratch: Scratch
) -> Tensor:
    """[C, 4] float64, this rank's partial sums of measured values: their totals over ranks give entropies, forward KL
    and total variation.

    Columns: sum q x, sum p y (shifted logits), sum p (log p - log q) at temperature 1, half the sum of |p - q|.
    """
    parts = torch.zeros(len(student), 4, dtype=torch.float64, device=student.device)
    for rows in row_blocks(student, scratch):
        block = _pair_block(student, teacher, rows, totals, temperature, scratch)
        q, p = block.q(), block.p()
        parts[rows, 0] = torch.mul(q, block.x, out=block.spare()).sum(1).double()
        parts[rows, 1] = torch.mul(p, block.y, out=block.spare()).sum(1).double()
        parts[rows, 3] = q.sub_(p).abs_().sum(1).double() / 2
        if temperature != 1.0:
            block = _pair_block(student, teacher, rows, totals, 1.0, scratch)
            p = block.p()
        parts[rows, 2] = block.log_ratio().mul_(p).sum(1).double()
    return parts


def first_argmax(slab: Tensor, scratch: Scratch) -> Tensor:
    """[C, 2] float64: each row's largest logit and the smallest column that holds it (-inf and 0 without columns)."""
    found = torch.zeros(len(slab), 2, dtype=torch.float64, device=slab.device)
    if slab.shape[1] == 0:
        found[:, 0] = float("-inf")
        return found
    for rows in row_blocks(slab, scratch):
        block = slab[rows]
        column = block.argmax(1)  # the first of several maxima
        found[rows, 0] = block.gather(1, column[:, None])[:, 0].double()
        found[rows, 1] = column.double()
    return found


def _pair_block(
    student: Tensor,
    teacher: Tensor,
    rows: slice,
    totals: PairTotals,
    temperature: float,
    scratch: Scratch,
    *,
    keep_teacher: bool = True,
) -> PairBlock:
    """Both models' shifted rows in buffers; without keep_teacher the teacher's are shifted in its slab, which saves a
    buffer in cache."""
    num_rows, at_one = len(student[rows]), temperature == 1.0
    s, t, y = totals.student, totals.teacher, teacher[rows]
    return PairBlock(
        shifted(student[rows], s.peak[rows], temperature, scratch.take(0, num_rows)),
        shifted(y, t.peak[rows], temperature, scratch.take(1, num_rows) if keep_teacher else y),
        (s.log_sum_1 if at_one else s.log_sum)[rows],
        (t.log_sum_1 if at_one else t.log_sum)[rows],
        totals.vocab_size,
        scratch,
    )


def _probabilities(logits: Tensor, totals: RowTotals, rows: slice, temperature: float, scratch: Scratch) -> Tensor:
    """softmax(s / temperature) of a block, in a buffer."""
    x = shifted(logits, totals.peak[rows], temperature, scratch.take(2, len(logits)))
    return x.exp_().mul_(torch.exp(-totals.log_sum[rows]).to(x.dtype)[:, None])


def _softmax_(block: Tensor, totals: RowTotals, rows: slice) -> Tensor:
    """block <- softmax(s) at temperature 1; the same operations as `PairBlock.q`, so the same bits."""
    block.sub_(totals.peak[rows].to(block.dtype)[:, None]).exp_()
    return block.mul_(torch.exp(-totals.log_sum_1[rows]).to(block.dtype)[:, None])


def _weigh_ce(softmax: Tensor, rows: slice, weights: RowWeights, out: Tensor) -> None:
    """out <- weights.softmax * softmax - ce * onehot(label)."""
    ce = weights.ce[rows].to(out.dtype)
    torch.mul(softmax, weights.softmax[rows].to(out.dtype)[:, None], out=out)
    if out.shape[1]:
        column = weights.labels[rows]
        out.scatter_add_(1, column.clamp(min=0)[:, None], -ce.where(column >= 0, 0.0)[:, None])


def _store(block: Tensor, operand: Tensor) -> None:
    """Round a finished block into its operand, through a copy because they may share memory."""
    if operand.dtype != block.dtype:
        operand.copy_(block.to(operand.dtype))


def _behind(gathered: Tensor) -> tuple[Tensor, Tensor]:
    """(max over ranks [C], every rank's maximum minus it [ranks, C]: 0 or negative, -inf for an empty rank)."""
    peak = finite(gathered[:, :, 0].amax(0))
    return peak, gathered[:, :, 0] - peak
