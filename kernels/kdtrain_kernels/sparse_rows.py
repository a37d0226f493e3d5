"""Row kernels in torch for a teacher known at K ids: statistics without the ids, gradients including them.

C rows of a chunk, n columns: slabs as in `torch_rows` (raw logits, rows possibly further apart than n, n may be 0).
columns [C, K] int64: the ids' columns on this rank, -1 where another rank owns the id or the slot is empty; no column
twice in a row. No function communicates. `sparse_table` has the computation between the two kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdtrain_kernels.blocks import Scratch, front_of_rows, row_blocks
from kdtrain_kernels.sparse_table import SparseGradient
from kdtrain_kernels.torch_rows import ROW_STATS, LogitMap, row_stats


def sparse_stats(slab: Tensor, columns: Tensor, labels: Tensor, temperature: float, scratch: Scratch) -> Tensor:
    """[C, ROW_STATS + K] in the slab's dtype: `row_stats` of the columns outside the ids, then the logits at the ids.

    Overwrites this rank's ids with -inf in the slab, so that the rest is summed directly, without a membership test and
    without subtracting from a total. The label's logit is the true one even if the label is an id; labels [C] int64
    columns, -1 where not on this rank. Ids of other ranks and empty slots come out as -inf.
    """
    stats = slab.new_full((slab.shape[0], ROW_STATS + columns.shape[1]), float("-inf"))
    label = stats.new_zeros(slab.shape[0])
    if slab.shape[1]:
        here = slab.gather(1, columns.clamp(min=0))
        stats[:, ROW_STATS:] = here.masked_fill_(columns < 0, float("-inf"))
        label = slab.gather(1, labels.clamp(min=0)[:, None])[:, 0].where(labels >= 0, 0.0)
        write_at(slab, columns, here.fill_(float("-inf")))
    stats[:, :ROW_STATS] = row_stats(slab, labels, temperature, scratch)
    stats[:, ROW_STATS - 1] = label
    return stats


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
    """d loss / d product [C, n] in the memory of the slab that `sparse_stats` left, as `torch_rows.row_grad` places it.

    In the slab's own dtype it is the slab; rounded to a narrower one, a view of the front of each of its rows.
    """
    operand = front_of_rows(slab, operand_dtype)
    if slab.shape[1] == 0:
        return operand
    for rows in row_blocks(slab, scratch):
        block = slab[rows]
        slope = logit_map.slope(block, scratch.take(0, len(block)))
        _stream(block, rows, gradient, temperature, scratch)
        column = labels[rows]
        ce = gradient.ce[rows].to(block.dtype).where(column >= 0, 0.0)
        block.scatter_add_(1, column.clamp(min=0)[:, None], -ce[:, None])
        if slope is not None:
            block.mul_(slope)
        write_at(block, columns[rows], gradient.at_ids[rows].to(block.dtype))
        if operand.dtype != block.dtype:
            operand[rows].copy_(block.to(operand.dtype))  # through a copy, because both share memory
    return operand


def _stream(block: Tensor, rows: slice, gradient: SparseGradient, temperature: float, scratch: Scratch) -> None:
    """block <- tail * exp((s - peak) / temperature) + softmax * exp(s - peak); ids are at -inf and come out as 0."""

    def column(values: Tensor) -> Tensor:
        return values[rows].to(block.dtype)[:, None]

    block.sub_(column(gradient.peak))
    if temperature == 1.0:
        block.exp_().mul_(column(gradient.tail + gradient.softmax))
        return
    hot = torch.div(block, temperature, out=scratch.take(1, len(block))).exp_()
    block.exp_().mul_(column(gradient.softmax)).addcmul_(hot, column(gradient.tail))


def write_at(slab: Tensor, columns: Tensor, values: Tensor) -> None:
    """slab[i, columns[i, j]] = values[i, j] wherever columns[i, j] >= 0; slab [C, n], n > 0; the others [C, K].

    Shapes do not depend on the number of such slots: a slot without a column repeats the write of one that has a
    column, or, in a row without any, writes back the value of column 0.
    """
    here = columns >= 0
    one = here.to(torch.uint8).argmax(1, keepdim=True)
    column = columns.gather(1, one).clamp(min=0)
    value = values.gather(1, one).where(here.gather(1, one), slab.gather(1, column))
    slab.scatter_(1, columns.where(here, column), values.where(here, value))
