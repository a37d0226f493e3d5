"""`kdtrain_kernels.topk_rows` in Triton: one program per row, float32 slabs, the same order and the same exactness.

    slab row     | W columns | W columns | ... |        read once: lane maxima; once more: sums of the tail
    lane maxima  |     x     |     x     | ... |        4 / W bytes per element, written and read
    candidates   the `take` first lanes, W columns each: processed one by one, read twice

`take` is min(k + 1, n): the entry after the list is the tail's peak. The selection of lanes and that of columns both
find the smallest kept key by counting, 32 times over values in registers, and break ties by the lowest position, so
that ties cannot overflow. Only the `take` entries themselves are sorted.

A slab's row stride may exceed n columns; the gap is read and ignored.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from kdtrain_kernels.blocks import FLOOR, Scratch, finite
from kdtrain_kernels.topk_rows import (
    SAMPLE_LANE,
    STATS,
    Merged,
    Selection,
    merged_numbers,
    order_keys,
    restore,
    split_keys,
)
from kdtrain_kernels.triton import topk_kernels as kernels
from kdtrain_kernels.triton.device import backend_of, launch

__all__ = ["restore", "tail_cdf", "tail_sample", "topk_merge", "topk_select"]

TILE = 4096
"""Columns of a row that a program reads at a time: 16 per thread, four 16-byte loads in flight."""
WARPS = 8
MOST_LANES = 8192
"""Lane maxima that a program holds in registers: 32 per thread."""
PIECE = 4096
"""Candidates of a row that are listed at a time: their positions take more registers than their keys."""
SORT_LIMIT = 2048
"""Longest row of keys that one program sorts; longer ones use torch.sort."""


def topk_select(
    slab: Tensor, k: int, temperatures: tuple[float, ...], *, entropy: bool, scratch: Scratch, tile: int = TILE
) -> Selection:
    """As `topk_rows.topk_select`; `scratch` is not used. tile: columns read at a time, a power of two.

    Raises ValueError for slabs that are not float32.
    """
    _require_float32(slab)
    num_rows, n = slab.shape
    listed, take = min(k, n), min(k + 1, n)
    values = slab.new_empty(num_rows, listed)
    columns = torch.empty(num_rows, listed, dtype=torch.int64, device=slab.device)
    stats = torch.zeros(num_rows, STATS + len(temperatures), dtype=torch.float64, device=slab.device)
    stats[:, 1] = float("-inf")
    if n == 0 or num_rows == 0:
        return Selection(values, columns, stats)
    width = _lane_width(n, tile)
    lanes = triton.cdiv(n, width)
    take_lanes = min(take, lanes)
    maxima = slab.new_empty(num_rows, lanes)
    common = (slab.stride(0), n, lanes)
    launch(
        kernels.lane_maxima_kernel,
        slab,
        num_rows,
        slab,
        maxima,
        stats,
        *common,
        stats.stride(0),
        W=width,
        LANES=tile // width,
        warps=WARPS,
    )
    lane_list = torch.empty(num_rows, _power(take_lanes), dtype=torch.int32, device=slab.device)
    key_list = torch.empty(num_rows, _power(take), dtype=torch.int64, device=slab.device)
    launch(
        kernels.select_kernel,
        slab,
        num_rows,
        slab,
        maxima,
        lane_list,
        key_list,
        values,
        columns,
        stats,
        *common,
        k,
        take,
        take_lanes,
        stats.stride(0),
        W=width,
        G=_power(lanes),
        L=lane_list.shape[1],
        K=key_list.shape[1],
        PIECE=min(PIECE, lane_list.shape[1] * width),
        warps=select_warps(lane_list.shape[1] * width, backend_of(slab)),
    )
    for place, temperature in enumerate(temperatures if n > k else ()):
        launch(
            kernels.tail_sums_kernel,
            slab,
            num_rows,
            slab,
            stats,
            slab.stride(0),
            n,
            stats.stride(0),
            STATS + place,
            float(temperature),
            FLOOR=FLOOR,
            ENTROPY=entropy and place == 0,
            TILE=tile,
            warps=WARPS,
        )
    return Selection(values, columns, stats)


def topk_merge(
    values: Tensor, ids: Tensor, stats: Tensor, k: int, temperatures: tuple[float, ...], *, entropy: bool
) -> Merged:
    """As `topk_rows.topk_merge`. Raises ValueError for values that are not float32."""
    _require_float32(values)
    keys = order_keys(values, ids).transpose(0, 1).flatten(1).contiguous()
    num_rows, width = keys.shape
    if _power(width) > SORT_LIMIT:
        keys = keys.sort(dim=1, descending=True).values
    elif values.shape[0] > 1 and num_rows:  # the list of a single rank is already in order
        launch(kernels.sort_keys_kernel, keys, num_rows, keys, width, P=_power(width), warps=merge_warps(_power(width)))
    top, top_ids = split_keys(keys[:, :k])
    lost, _ = split_keys(keys[:, k:])
    return Merged(top, top_ids, merged_numbers(top, lost, stats, temperatures, entropy=entropy))


def tail_cdf(slab: Tensor, peak: Tensor, temperature: float, *, scratch: Scratch, tile: int = TILE) -> Tensor:
    """As `topk_rows.tail_cdf`; `scratch` is not used. Raises ValueError for slabs that are not float32."""
    _require_float32(slab)
    num_rows, n = slab.shape
    lanes = triton.cdiv(n, SAMPLE_LANE)
    sums = slab.new_empty(num_rows, lanes)
    if n and num_rows:
        launch(
            kernels.lane_sums_kernel,
            slab,
            num_rows,
            slab,
            _finite32(peak),
            sums,
            slab.stride(0),
            n,
            lanes,
            float(temperature),
            W=SAMPLE_LANE,
            LANES=max(1, tile // SAMPLE_LANE),
            warps=WARPS,
        )
    return sums.cumsum(1, dtype=torch.float64)


def tail_sample(slab: Tensor, cdf: Tensor, targets: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """As `topk_rows.tail_sample`. Raises ValueError for slabs that are not float32."""
    _require_float32(slab)
    found = torch.zeros(targets.shape, dtype=torch.int64, device=slab.device)
    num_rows, n = slab.shape
    if not n or not targets.numel():
        return found
    lanes, draws = cdf.shape[1], targets.shape[1]
    launch(
        kernels.tail_sample_kernel,
        slab,
        num_rows,
        slab,
        cdf,
        targets.contiguous(),
        _finite32(peak),
        found,
        slab.stride(0),
        n,
        lanes,
        draws,
        float(temperature),
        max(1, math.ceil(math.log2(lanes)) + 1),
        W=SAMPLE_LANE,
        M=_power(draws),
        warps=WARPS,
    )
    return found


def select_warps(candidates: int, backend: str) -> int:
    """Warps that hold a row's candidates in registers; on AMD, with 64 threads per warp, few warps are fastest."""
    return WARPS if candidates <= 8192 or backend == "hip" else 2 * WARPS


def merge_warps(width: int) -> int:
    """Warps that sort `width` keys in registers."""
    return WARPS if width < SORT_LIMIT else 2 * WARPS


def _lane_width(n: int, tile: int) -> int:
    """Columns of a lane: 32 (16 for short rows), more only if a row would have too many lanes for the registers."""
    width = min(16 if n <= 16384 else 32, tile)
    while triton.cdiv(n, width) > MOST_LANES:
        width *= 2
    return width


def _power(count: int) -> int:
    """The next power of two, which Triton's ranges and sorts need; at least 2."""
    return max(2, int(triton.next_power_of_2(count)))


def _finite32(peak: Tensor) -> Tensor:
    return finite(peak).float().contiguous()


def _require_float32(tensor: Tensor) -> None:
    """The kernels' arithmetic is float32."""
    if tensor.dtype != torch.float32:
        raise ValueError(f"the triton kernels take float32 logits, got {tensor.dtype}; choose backend torch")
