"""The kernels of `topk_rows` in Triton: one program per row, float32 slabs, the same order and the same exactness.

    slab row     | W columns | W columns | ... |        read once: lane maxima; once more: sums of the tail
    lane maxima  |     x     |     x     | ... |        4 / W bytes per element, written and read
    candidates   the `take` first lanes, W columns each: the only columns that are looked at one by one

`take` is min(k + 1, n): the entry after the list is the tail's peak. Both choices, of lanes and of columns, find the
smallest key that is kept by counting, 32 times over values in registers, and fill up with the lowest places among
equal ones; so nothing overflows, whatever the ties. Only the `take` entries themselves are sorted.

A slab's rows may be further apart than n columns; what lies between is read and ignored.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
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
from kdtrain_kernels.triton.device import on_device_of

__all__ = ["restore", "tail_cdf", "tail_sample", "topk_merge", "topk_select"]

TILE = 4096
"""Columns of a row that a program reads at a time: 16 per thread, four 16-byte loads in flight."""
WARPS = 8
MOST_LANES = 8192
"""Lane maxima that a program holds in registers: 32 per thread."""
FEW_CANDIDATES = 8192
"""Candidates of a row up to which WARPS hold them without spilling registers; twice the warps hold twice as many."""
SORT_LIMIT = 2048
"""Longest row of keys that is sorted by one program; longer ones go through torch.sort."""


@triton.jit
def _ordered(x):
    """int32 that are ordered as float32 are, with -0.0 equal to 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _first(key, take):
    """Which of key [N] int32 are the `take` largest; among equal ones those of the lowest places."""
    low = tl.min(key, 0).to(tl.int64)
    high = tl.max(key, 0).to(tl.int64)
    for _ in range(32):
        middle = low + (high - low + 1) // 2
        is_enough = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), 0) >= take
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, tl.maximum(middle - 1, low))
    least = low.to(tl.int32)
    is_above = key > least
    is_equal = key == least
    spare = take - tl.sum(is_above.to(tl.int32), 0)
    return is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= spare))


@triton.jit
def _lane_maxima(slab, maxima, stats, stride, n, lanes, stats_stride, W: tl.constexpr, LANES: tl.constexpr):
    """maxima [C, lanes] float32; stats[:, 0] = 1.0 where a row holds NaN or +inf, else 0.0."""
    row = tl.program_id(0).to(tl.int64)
    slab += row * stride
    bad = tl.zeros([LANES], tl.int32)
    for first in range(0, n, LANES * W):
        columns = first + tl.arange(0, LANES)[:, None] * W + tl.arange(0, W)[None, :]
        x = tl.load(slab + columns, mask=columns < stride, other=float("-inf"))
        x = tl.where(columns < n, x, float("-inf"))
        bad += tl.sum((x < float("inf")).to(tl.int32), 1) - W
        lane = first // W + tl.arange(0, LANES)
        tl.store(maxima + row * lanes + lane, tl.max(x, 1), mask=lane < lanes)
    tl.store(stats + row * stats_stride, (tl.sum(bad, 0) != 0).to(tl.float64))


@triton.jit
def _select(
    slab,
    maxima,
    lane_list,
    key_list,
    values,
    columns,
    stats,
    stride,
    n,
    lanes,
    k,
    take,
    take_lanes,
    stats_stride,
    W: tl.constexpr,
    G: tl.constexpr,
    L: tl.constexpr,
    K: tl.constexpr,
):
    """values, columns [C, min(k, n)] in order; stats[:, 1] = the tail's peak; the list becomes -inf in the slab.

    lane_list [C, L] int32 and key_list [C, K] int64 hold what a program hands itself across a barrier.
    G >= lanes, L >= take_lanes, K >= take.
    """
    row = tl.program_id(0).to(tl.int64)
    slab += row * stride
    lane = tl.arange(0, G)
    maximum = tl.load(maxima + row * lanes + lane, mask=lane < lanes, other=float("-inf"))
    key = tl.where(lane < lanes, _ordered(maximum), -2147483648)
    is_first = _first(key, take_lanes)
    place = tl.cumsum(is_first.to(tl.int32), 0) - 1
    tl.store(lane_list + row * L + place, lane, mask=is_first)
    tl.debug_barrier()
    chosen = tl.arange(0, L)
    chosen = tl.load(lane_list + row * L + chosen, mask=chosen < take_lanes, other=G)
    # lanes come in ascending order, so candidates are in the order of columns; absent ones are at the end
    column = tl.reshape(chosen[:, None] * W + tl.arange(0, W)[None, :], [L * W])
    is_there = column < n
    key = tl.where(is_there, _ordered(tl.load(slab + column, mask=is_there, other=float("-inf"))), -2147483648)
    is_first = _first(key, take)
    place = tl.cumsum(is_first.to(tl.int32), 0) - 1
    whole_key = (key.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
    tl.store(key_list + row * K + place, whole_key, mask=is_first)
    tl.debug_barrier()
    entry = tl.arange(0, K)
    whole_key = tl.load(key_list + row * K + entry, mask=entry < take, other=-9223372036854775808)
    whole_key = tl.sort(whole_key, descending=True)
    bits = (whole_key >> 32).to(tl.int32)
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    column = 0x7FFFFFFF - (whole_key & 0xFFFFFFFF)
    listed = tl.minimum(k, n)
    is_listed = entry < listed
    tl.store(values + row * listed + entry, value, mask=is_listed)
    tl.store(columns + row * listed + entry, column, mask=is_listed)
    tl.store(slab + column, float("-inf"), mask=is_listed)
    peak = tl.max(tl.where((entry == k) & (entry < take), value, float("-inf")), 0)
    tl.store(stats + row * stats_stride + 1, peak.to(tl.float64))


@triton.jit
def _tail_sums(
    slab,
    stats,
    stride,
    n,
    stats_stride,
    place,
    temperature,
    FLOOR: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    """stats[:, place] = sum e^y, y = (s - peak) / temperature; with ENTROPY stats[:, 2] = sum e^y y."""
    row = tl.program_id(0).to(tl.int64)
    slab += row * stride
    stats += row * stats_stride
    peak = tl.load(stats + 1).to(tl.float32)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([TILE], tl.float32)
    moment = tl.zeros([TILE], tl.float32)
    for first in range(0, n, TILE):
        column = first + tl.arange(0, TILE)
        x = tl.load(slab + column, mask=column < stride, other=float("-inf"))
        y = tl.maximum((tl.where(column < n, x, float("-inf")) - peak) / temperature, FLOOR)
        power = tl.exp(y)
        total += power
        if ENTROPY:
            moment += power * y
    tl.store(stats + place, tl.sum(total.to(tl.float64), 0))
    if ENTROPY:
        tl.store(stats + 2, tl.sum(moment.to(tl.float64), 0))


@triton.jit
def _sort_keys(keys, width, P: tl.constexpr):
    """Each row of keys [c, width] int64 in descending order, in place."""
    entry = tl.arange(0, P)
    keys += tl.program_id(0).to(tl.int64) * width
    key = tl.load(keys + entry, mask=entry < width, other=-9223372036854775808)
    tl.store(keys + entry, tl.sort(key, descending=True), mask=entry < width)


@triton.jit
def _lane_sums(slab, peaks, sums, stride, n, lanes, temperature, W: tl.constexpr, LANES: tl.constexpr):
    """sums [C, lanes] float32 of exp((s - peak) / temperature). peaks [C] float32, finite."""
    row = tl.program_id(0).to(tl.int64)
    slab += row * stride
    peak = tl.load(peaks + row)
    for first in range(0, n, LANES * W):
        column = first + tl.arange(0, LANES)[:, None] * W + tl.arange(0, W)[None, :]
        x = tl.load(slab + column, mask=column < stride, other=float("-inf"))
        x = tl.where(column < n, x, float("-inf"))
        lane = first // W + tl.arange(0, LANES)
        tl.store(sums + row * lanes + lane, tl.sum(tl.exp((x - peak) / temperature), 1), mask=lane < lanes)


@triton.jit
def _tail_sample(
    slab,
    cdf,
    targets,
    peaks,
    found,
    stride,
    n,
    lanes,
    m,
    temperature,
    steps,
    W: tl.constexpr,
    M: tl.constexpr,
):
    """found [C, m] int64: columns where the distribution function reaches targets [C, m] float64.

    An entry is reached where its running sum exceeds the target or is already the whole: the last one that counts.
    """
    row = tl.program_id(0).to(tl.int64)
    slab += row * stride
    cdf += row * lanes
    draw = tl.arange(0, M)
    target = tl.load(targets + row * m + draw, mask=draw < m, other=0.0)
    whole = tl.load(cdf + lanes - 1)
    low = tl.zeros([M], tl.int32)
    high = tl.zeros([M], tl.int32) + (lanes - 1)
    for _ in range(steps):
        middle = (low + high) // 2
        running = tl.load(cdf + middle)
        is_reached = (running > target) | (running >= whole)
        high = tl.where(is_reached, middle, high)
        low = tl.where(is_reached, low, tl.minimum(middle + 1, high))
    before = tl.load(cdf + low - 1, mask=low > 0, other=0.0)
    column = low[:, None] * W + tl.arange(0, W)[None, :]
    x = tl.load(slab + column, mask=column < n, other=float("-inf"))
    power = tl.exp((x - tl.load(peaks + row)) / temperature).to(tl.float64)
    running = tl.cumsum(power, 1)
    is_reached = (running > (target - before)[:, None]) | (running >= tl.max(running, 1)[:, None])
    place = low * W + (W - tl.sum(is_reached.to(tl.int32), 1))
    tl.store(found + row * m + draw, tl.minimum(place, n - 1).to(tl.int64), mask=draw < m)


def _on(tensor: Tensor, kernel: Any, programs: int) -> Callable[..., None]:
    """The kernel's launcher with `programs` programs, on the tensor's device."""

    def launch(*arguments: Any, **constants: Any) -> None:
        with on_device_of(tensor):
            kernel[(programs,)](*arguments, **constants)

    return launch


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
    _on(slab, _lane_maxima, num_rows)(
        slab, maxima, stats, *common, stats.stride(0), W=width, LANES=tile // width, num_warps=WARPS
    )
    lane_list = torch.empty(num_rows, _power(take_lanes), dtype=torch.int32, device=slab.device)
    key_list = torch.empty(num_rows, _power(take), dtype=torch.int64, device=slab.device)
    _on(slab, _select, num_rows)(
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
        num_warps=WARPS if lane_list.shape[1] * width <= FEW_CANDIDATES else 2 * WARPS,
    )
    for place, temperature in enumerate(temperatures if n > k else ()):
        _on(slab, _tail_sums, num_rows)(
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
            num_warps=WARPS,
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
    elif values.shape[0] > 1 and num_rows:  # one rank's list is in order already
        _on(keys, _sort_keys, num_rows)(keys, width, P=_power(width), num_warps=WARPS)
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
        _on(slab, _lane_sums, num_rows)(
            slab,
            _finite32(peak),
            sums,
            slab.stride(0),
            n,
            lanes,
            float(temperature),
            W=SAMPLE_LANE,
            LANES=max(1, tile // SAMPLE_LANE),
            num_warps=WARPS,
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
    _on(slab, _tail_sample, num_rows)(
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
        num_warps=WARPS,
    )
    return found


def _lane_width(n: int, tile: int) -> int:
    """Columns of a lane: 32 (16 for short rows), more only where there would be too many lanes to hold."""
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
