"""The kernels: one program per row of a slab, walking its columns from left to right a block at a time.

Sums and maxima are kept per lane of a block and reduced once, at the end of a row. Rows are loaded up to their stride,
a multiple of 128, so that loads are 16 bytes wide; columns from n on count as -inf and are overwritten with 0 by
gradients. `numbers` [k, C] float64 holds k numbers of each row; the programs are as many as the rows. Arguments that
change between calls (temperature, caps) are numbers; those that select code are constexpr.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdtrain_kernels.triton.barrier import after_all
from kdtrain_kernels.triton.maths import FLOOR, shifted, terms

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The lowest finite float32, as initial value of a running maximum: differences with it are never NaN."""


@triton.jit
def _load(row_start, cols, n, stride):
    """Logits of a block of a row, -inf past its end."""
    values = tl.load(row_start + cols, mask=cols < stride, other=float("-inf"))
    return tl.where(cols < n, values, float("-inf"))


@triton.jit
def _number(numbers, index: tl.constexpr):
    return tl.load(numbers + index * tl.num_programs(0) + tl.program_id(0))


@triton.jit
def _grow(total, x, peak, inv_temperature, AT_ONE: tl.constexpr):
    """The sum of exp((. - peak) / temperature) including x, relative to max(x, peak), with one exponential."""
    fall = tl.where(x > peak, peak - x, x - peak)
    if not AT_ONE:
        fall = fall * inv_temperature
    factor = tl.exp(fall)
    return tl.where(x > peak, total * factor + 1, total + factor)


@triton.jit(do_not_specialize=["n"])
def row_stats_kernel(
    slab, stride, n, labels, out, out_stride, inv_temperature, AT_ONE: tl.constexpr, BLOCK: tl.constexpr
):
    """out[row, :4] = maximum, sum at the temperature, sum at temperature 1, label's logit."""
    row = tl.program_id(0).to(tl.int64)
    row_start = slab + row * stride
    peak = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    total_1 = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        x = _load(row_start, first + tl.arange(0, BLOCK), n, stride)
        if not AT_ONE:
            total = _grow(total, x, peak, inv_temperature, False)
        total_1 = _grow(total_1, x, peak, 1.0, True)
        peak = tl.where(x > peak, x, peak)
    top = tl.max(peak, 0)
    behind = peak - top
    sum_1 = tl.sum(total_1 * tl.exp(behind), 0)
    sum_t = sum_1
    if not AT_ONE:
        sum_t = tl.sum(total * tl.exp(behind * inv_temperature), 0)
    label = tl.load(labels + row)
    answer = out + row * out_stride
    tl.store(answer, tl.where(sum_1 == 0, float("-inf"), top))
    tl.store(answer + 1, sum_t)
    tl.store(answer + 2, sum_1)
    tl.store(answer + 3, tl.load(row_start + label, mask=label >= 0, other=0.0))


@triton.jit(do_not_specialize=["n"])
def coupling_kernel(
    student,
    teacher,
    stride_s,
    stride_t,
    n,
    stats,
    stats_stride,
    inv_temperature,
    AT_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """stats[row, 8:10] = sum e^x (x - y) and sum e^x where y is FLOOR, from the maxima in columns 0 and 4."""
    row = tl.program_id(0).to(tl.int64)
    answer = stats + row * stats_stride
    peak_s = tl.load(answer).to(tl.float32)
    peak_t = tl.load(answer + 4).to(tl.float32)
    peak_s = tl.where(peak_s == float("-inf"), 0.0, peak_s)
    peak_t = tl.where(peak_t == float("-inf"), 0.0, peak_t)
    gap = tl.zeros([BLOCK], tl.float32)
    floored = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = shifted(_load(student + row * stride_s, cols, n, stride_s), peak_s, inv_temperature, AT_ONE)
        y = shifted(_load(teacher + row * stride_t, cols, n, stride_t), peak_t, inv_temperature, AT_ONE)
        weight = tl.exp(x)
        gap += (x - y) * weight
        floored += tl.where(y <= FLOOR, weight, 0.0)
    tl.store(answer + 8, tl.sum(gap, 0))
    tl.store(answer + 9, tl.sum(floored, 0))


@triton.jit
def _pair(numbers):
    """(peak_s, peak_t, log_sum_s, log_sum_t, e^-log_sum_s, e^-log_sum_t, log_sum_t - log_sum_s) of the row.

    From numbers 0 to 3: peak_s, peak_t, log_sum_s, log_sum_t.
    """
    log_sum_s = _number(numbers, 2)
    log_sum_t = _number(numbers, 3)
    return (
        _number(numbers, 0).to(tl.float32),
        _number(numbers, 1).to(tl.float32),
        log_sum_s.to(tl.float32),
        log_sum_t.to(tl.float32),
        tl.exp(-log_sum_s).to(tl.float32),
        tl.exp(-log_sum_t).to(tl.float32),
        (log_sum_t - log_sum_s).to(tl.float32),
    )


@triton.jit(do_not_specialize=["n"])
def pair_sums_kernel(
    student,
    teacher,
    stride_s,
    stride_t,
    n,
    numbers,
    out,
    inv_temperature,
    inv_vocab,
    KIND: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    AT_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[row, :2] = sums of the slope and of the value over the row's columns."""
    row = tl.program_id(0).to(tl.int64)
    peak_s, peak_t, log_sum_s, log_sum_t, inv_s, inv_t, offset = _pair(numbers)
    slopes = tl.zeros([BLOCK], tl.float32)
    values = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = shifted(_load(student + row * stride_s, cols, n, stride_s), peak_s, inv_temperature, AT_ONE)
        y = shifted(_load(teacher + row * stride_t, cols, n, stride_t), peak_t, inv_temperature, AT_ONE)
        value, slope = terms(x, y, log_sum_s, log_sum_t, inv_s, inv_t, offset, inv_vocab, KIND, A, B)
        slopes += tl.where(cols < n, slope, 0.0)
        values += tl.where(cols < n, value, 0.0)
    tl.store(out + row * 2, tl.sum(slopes, 0))
    tl.store(out + row * 2 + 1, tl.sum(values, 0))


@triton.jit
def _label_term(x, inv, cols, label, softmax, ce):
    """softmax * e^x inv - ce * onehot(label)."""
    weighted = tl.exp(x) * inv * softmax
    return tl.where(cols == label, weighted - ce, weighted)


@triton.jit
def _store_gradient(
    grad,
    logits,
    cols,
    n,
    stride,
    row_start,
    inv_cap,
    logit_scale,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    NARROW: tl.constexpr,
    BACKEND: tl.constexpr,
    PER_THREAD: tl.constexpr,
):
    """Multiply by d logits / d product and store in the operand's row, which may share the slab's memory."""
    if CAPPED:
        ratio = logits * inv_cap
        grad = grad * ((1 - ratio * ratio) * logit_scale)
    elif SCALED:
        grad = grad * logit_scale
    stored = tl.where(cols < n, grad, 0.0).to(row_start.dtype.element_ty)
    if NARROW:
        # A block's bfloat16 are stored over logits of this or an earlier block: every thread must have read its own
        # first.
        stored = after_all(stored, BACKEND, PER_THREAD)
    tl.store(row_start + cols, stored, mask=cols < stride)


@triton.jit(do_not_specialize=["n"])
def row_grad_kernel(
    slab,
    operand,
    stride,
    operand_stride,
    n,
    numbers,
    labels,
    inv_cap,
    logit_scale,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    NARROW: tl.constexpr,
    BACKEND: tl.constexpr,
    PER_THREAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row's d loss / d product for cross-entropy and z-loss. numbers: peak, log_sum_1, ce, softmax."""
    row = tl.program_id(0).to(tl.int64)
    peak = _number(numbers, 0).to(tl.float32)
    inv_1 = tl.exp(-_number(numbers, 1)).to(tl.float32)
    ce = _number(numbers, 2).to(tl.float32)
    softmax = _number(numbers, 3).to(tl.float32)
    label = tl.load(labels + row)
    for first in range(0, n, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        s = _load(slab + row * stride, cols, n, stride)
        grad = _label_term(shifted(s, peak, 1.0, True), inv_1, cols, label, softmax, ce)
        _store_gradient(
            grad,
            s,
            cols,
            n,
            stride,
            operand + row * operand_stride,
            inv_cap,
            logit_scale,
            CAPPED,
            SCALED,
            NARROW,
            BACKEND,
            PER_THREAD,
        )


@triton.jit(do_not_specialize=["n"])
def pair_grad_kernel(
    student,
    teacher,
    operand,
    stride_s,
    stride_t,
    operand_stride,
    n,
    numbers,
    labels,
    out,
    inv_temperature,
    inv_vocab,
    inv_cap,
    logit_scale,
    KIND: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    AT_ONE: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    NARROW: tl.constexpr,
    BACKEND: tl.constexpr,
    PER_THREAD: tl.constexpr,
    VALUED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row's d loss / d product, and if VALUED out[row] = the divergence's value.

    numbers: those of `_pair`, then log_sum_1 of the student, z, kd times temperature, ce, softmax.
    """
    row = tl.program_id(0).to(tl.int64)
    peak_s, peak_t, log_sum_s, log_sum_t, inv_s, inv_t, offset = _pair(numbers)
    inv_1 = tl.exp(-_number(numbers, 4)).to(tl.float32)
    z = _number(numbers, 5).to(tl.float32)
    kd = _number(numbers, 6).to(tl.float32)
    ce = _number(numbers, 7).to(tl.float32)
    softmax = _number(numbers, 8).to(tl.float32)
    label = tl.load(labels + row)
    values = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        s = _load(student + row * stride_s, cols, n, stride_s)
        x = shifted(s, peak_s, inv_temperature, AT_ONE)
        y = shifted(_load(teacher + row * stride_t, cols, n, stride_t), peak_t, inv_temperature, AT_ONE)
        value, slope = terms(x, y, log_sum_s, log_sum_t, inv_s, inv_t, offset, inv_vocab, KIND, A, B)
        if VALUED:
            values += tl.where(cols < n, value, 0.0)
        baseline = inv_vocab if KIND == "logit_mse" else tl.exp(x) * inv_s
        slope = slope - baseline * z
        grad = _label_term(shifted(s, peak_s, 1.0, True), inv_1, cols, label, softmax, ce)
        grad = tl.where(kd == 0, grad, grad + slope * kd)  # a row with kd weight 0 has the bits of cross-entropy
        _store_gradient(
            grad,
            s,
            cols,
            n,
            stride_s,
            operand + row * operand_stride,
            inv_cap,
            logit_scale,
            CAPPED,
            SCALED,
            NARROW,
            BACKEND,
            PER_THREAD,
        )
    if VALUED:
        tl.store(out + row, tl.sum(values, 0))


@triton.jit(do_not_specialize=["n"])
def pair_measure_kernel(
    student, teacher, stride_s, stride_t, n, numbers, out, inv_temperature, AT_ONE: tl.constexpr, BLOCK: tl.constexpr
):
    """out[row, :4] = sum q x, sum p y, sum p (log p - log q) at temperature 1, half the sum of |p - q|.

    numbers: those of `_pair`, then log_sum_1 of student and teacher.
    """
    row = tl.program_id(0).to(tl.int64)
    peak_s, peak_t, _, _, inv_s, inv_t, _ = _pair(numbers)
    inv_1 = tl.exp(-_number(numbers, 5)).to(tl.float32)
    offset_1 = (_number(numbers, 5) - _number(numbers, 4)).to(tl.float32)
    mean_s = tl.zeros([BLOCK], tl.float32)
    mean_t = tl.zeros([BLOCK], tl.float32)
    divergence = tl.zeros([BLOCK], tl.float32)
    distance = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        s = _load(student + row * stride_s, cols, n, stride_s)
        t = _load(teacher + row * stride_t, cols, n, stride_t)
        x = shifted(s, peak_s, inv_temperature, AT_ONE)
        y = shifted(t, peak_t, inv_temperature, AT_ONE)
        q = tl.exp(x) * inv_s
        p = tl.exp(y) * inv_t
        mean_s += q * x
        mean_t += p * y
        distance += tl.abs(q - p)
        x = shifted(s, peak_s, 1.0, True)
        y = shifted(t, peak_t, 1.0, True)
        divergence += tl.exp(y) * inv_1 * ((y - x) - offset_1)
    tl.store(out + row * 4, tl.sum(mean_s, 0))
    tl.store(out + row * 4 + 1, tl.sum(mean_t, 0))
    tl.store(out + row * 4 + 2, tl.sum(divergence, 0))
    tl.store(out + row * 4 + 3, tl.sum(distance, 0) * 0.5)


@triton.jit(do_not_specialize=["n"])
def first_argmax_kernel(slab, stride, n, out, BLOCK: tl.constexpr):
    """out[row, :2] = the row's maximum and the smallest column that holds it."""
    row = tl.program_id(0).to(tl.int64)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    column = tl.arange(0, BLOCK)
    for first in range(0, n, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = _load(slab + row * stride, cols, n, stride)
        column = tl.where(x > peak, cols, column)
        peak = tl.where(x > peak, x, peak)
    top = tl.max(peak, 0)
    tl.store(out + row * 2, top)
    tl.store(out + row * 2 + 1, tl.min(tl.where(peak == top, column, 2147483647), 0))
