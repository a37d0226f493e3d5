"""The row kernels of `kdtrain_kernels.sparse_rows` in Triton: same names, arguments and meaning, float32 slabs only.

One program per row. The row stride of a slab is a multiple of 128 elements, and the gap after its n columns may be read
and written: loads and stores are masked by the stride, so that they move 16 bytes at a time, and values by n.
Arithmetic is float32 for every stored dtype.
"""

# Kernels take pointers and numbers, which Python's types do not describe.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdtrain_kernels.blocks import Scratch, front_of_rows
from kdtrain_kernels.sparse_table import SparseGradient
from kdtrain_kernels.torch_rows import ROW_STATS, LogitMap
from kdtrain_kernels.triton.barrier import after_all
from kdtrain_kernels.triton.device import launch, rounding

BLOCK = 4096
"""Columns that a program has in registers."""
MAX_IDS = 1024
"""Ids that a program has in registers."""
WARPS = 8
STRIDE_MULTIPLE = 128


@triton.jit
def sparse_stats_kernel(
    slab,
    columns,
    labels,
    out,
    stride,
    n,
    num_ids,
    inverse_temperature,
    OUT_OFFSET: tl.constexpr,
    AT_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
):
    """out[row] = max, sum exp((s - max) / temperature), sum exp(s - max), label's logit, logits at the ids."""
    row = tl.program_id(0).to(tl.int64)
    base = slab + row * stride
    mine = out + row * (num_ids + OUT_OFFSET)
    label = tl.load(labels + row)
    tl.store(mine + 3, tl.load(base + label, mask=label >= 0, other=0.0))
    for first in range(0, num_ids, IDS):
        slot = first + tl.arange(0, IDS)
        column = tl.load(columns + row * num_ids + slot, mask=slot < num_ids, other=-1)
        logit = tl.load(base + column, mask=column >= 0, other=float("-inf"))
        tl.store(mine + OUT_OFFSET + slot, logit, mask=slot < num_ids)
    tl.debug_barrier()  # all threads must have read the logits before they are overwritten
    for first in range(0, num_ids, IDS):
        slot = first + tl.arange(0, IDS)
        column = tl.load(columns + row * num_ids + slot, mask=slot < num_ids, other=-1)
        tl.store(base + column, tl.full((IDS,), float("-inf"), tl.float32), mask=column >= 0)
    tl.debug_barrier()  # and must see them masked
    peak = float("-inf")
    total = tl.zeros((BLOCK,), tl.float32)
    total_1 = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        logit = tl.load(base + cols, mask=cols < stride, other=float("-inf"))
        logit = tl.where(cols < n, logit, float("-inf"))
        higher = tl.maximum(peak, tl.max(logit, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # only masked columns so far
        total_1 = total_1 * tl.exp(peak - shift) + tl.exp(logit - shift)
        if not AT_ONE:
            old = tl.exp((peak - shift) * inverse_temperature)
            total = total * old + tl.exp((logit - shift) * inverse_temperature)
        peak = higher
    sum_1 = tl.sum(total_1, 0)
    tl.store(mine, peak)
    tl.store(mine + 1, sum_1 if AT_ONE else tl.sum(total, 0))
    tl.store(mine + 2, sum_1)


@triton.jit
def sparse_grad_kernel(
    slab,
    columns,
    labels,
    at_ids,
    factors,
    out,
    stride,
    n,
    num_ids,
    inverse_temperature,
    scale,
    inverse_cap,
    AT_ONE: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDENING: tl.constexpr,
    NARROW: tl.constexpr,
    BACKEND: tl.constexpr,
    PER_THREAD: tl.constexpr,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
):
    """Row of d loss / d product over the row's own logits. out: the slab's memory, in the operand's dtype.

    factors [C, 4]: peak, tail, softmax, ce. WIDENING: elements of `out` in one of the slab.
    """
    row = tl.program_id(0).to(tl.int64)
    base = slab + row * stride
    target = out + row * stride * WIDENING
    peak = tl.load(factors + row * 4)
    tail = tl.load(factors + row * 4 + 1)
    softmax = tl.load(factors + row * 4 + 2)
    ce = tl.load(factors + row * 4 + 3)
    label = tl.load(labels + row)
    for first in range(0, n, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        logit = tl.load(base + cols, mask=cols < stride, other=0.0)
        if AT_ONE:
            grad = tl.exp(logit - peak) * (tail + softmax)
        else:
            grad = tl.exp((logit - peak) * inverse_temperature) * tail + tl.exp(logit - peak) * softmax
        grad = tl.where(cols == label, grad - ce, grad)
        if CAPPED:
            ratio = logit * inverse_cap
            grad = grad * (1.0 - ratio * ratio)
        stored = tl.where(cols < n, grad * scale, 0.0).to(out.dtype.element_ty)
        if NARROW:
            # narrower elements are stored in front of their logits: over logits of this block at the start of the row,
            # of earlier blocks further on, which a slower warp may not have read yet
            stored = after_all(stored, BACKEND, PER_THREAD)
        tl.store(target + cols, stored, mask=cols < stride)
    tl.debug_barrier()  # values stored by the loop at masked columns (0, or NaN where capped) are overwritten below
    for first in range(0, num_ids, IDS):
        slot = first + tl.arange(0, IDS)
        column = tl.load(columns + row * num_ids + slot, mask=slot < num_ids, other=-1)
        value = tl.load(at_ids + row * num_ids + slot, mask=slot < num_ids, other=0.0)
        tl.store(target + column, value.to(out.dtype.element_ty), mask=column >= 0)


def sparse_stats(slab: Tensor, columns: Tensor, labels: Tensor, temperature: float, scratch: Scratch) -> Tensor:
    """As `sparse_rows.sparse_stats`. Does not read `scratch`. Raises ValueError for unsupported slabs."""
    _check(slab)
    num_rows, num_ids = columns.shape
    out = slab.new_empty(num_rows, ROW_STATS + num_ids)
    launch(
        sparse_stats_kernel,
        slab,
        num_rows,
        slab,
        columns.contiguous(),
        labels,
        out,
        slab.stride(0),
        slab.shape[1],
        num_ids,
        1.0 / temperature,
        OUT_OFFSET=ROW_STATS,
        AT_ONE=temperature == 1.0,
        BLOCK=BLOCK,
        IDS=_ids_block(num_ids),
        warps=WARPS,
    )
    return out


def sparse_grad(
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
    """As `sparse_rows.sparse_grad`. Does not read `scratch`. Raises ValueError for unsupported slabs."""
    _check(slab)
    operand = front_of_rows(slab, operand_dtype)
    num_rows, num_ids = columns.shape
    if num_rows == 0 or slab.shape[1] == 0:
        return operand
    factors = torch.stack([gradient.peak, gradient.tail, gradient.softmax, gradient.ce], 1).float()
    cap, scale = logit_map.softcap, logit_map.logit_scale
    launch(
        sparse_grad_kernel,
        slab,
        num_rows,
        slab,
        columns.contiguous(),
        labels,
        gradient.at_ids.float().contiguous(),
        factors,
        operand,
        slab.stride(0),
        slab.shape[1],
        num_ids,
        1.0 / temperature,
        scale,
        0.0 if cap is None else 1 / cap,
        AT_ONE=temperature == 1.0,
        CAPPED=cap is not None,
        WIDENING=slab.element_size() // operand.element_size(),
        **rounding(slab, operand, BLOCK, WARPS),
        BLOCK=BLOCK,
        IDS=_ids_block(num_ids),
        warps=WARPS,
    )
    return operand


def _ids_block(num_ids: int) -> int:
    return int(min(MAX_IDS, triton.next_power_of_2(num_ids)))


def _check(slab: Tensor) -> None:
    if slab.dtype != torch.float32:
        raise ValueError(f"the slab has dtype {slab.dtype}, need torch.float32 for backend triton; use backend = torch")
    if slab.stride(0) % STRIDE_MULTIPLE or (slab.shape[1] > 1 and slab.stride(1) != 1):
        raise ValueError(
            f"the slab has strides {slab.stride()}, need rows a multiple of {STRIDE_MULTIPLE} elements apart"
        )
