"""The kernels of `kdtrain_kernels.triton.topk`, whose docstring describes the passes over a row: one program per
row."""

# Kernels take pointers and numbers, which Python's types do not describe.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ordered(x):
    """int32 keys in the order of the float32 values, with -0.0 equal to 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _least(key, take):
    """(the smallest of the `take` largest of key [...] int32, how many equal to it are among them)."""
    low = tl.min(key).to(tl.int64)
    high = tl.max(key).to(tl.int64)
    for _ in range(32):
        middle = low + (high - low + 1) // 2
        is_enough = tl.sum((key >= middle.to(tl.int32)).to(tl.int32)) >= take
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, tl.maximum(middle - 1, low))
    least = low.to(tl.int32)
    return least, take - tl.sum((key > least).to(tl.int32))


@triton.jit
def _first(key, take):
    """Mask of the `take` largest of key [N] int32; ties go to the lowest positions."""
    least, spare = _least(key, take)
    is_equal = key == least
    return (key > least) | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= spare))


@triton.jit
def lane_maxima_kernel(slab, maxima, stats, stride, n, lanes, stats_stride, W: tl.constexpr, LANES: tl.constexpr):
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
def select_kernel(
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
    PIECE: tl.constexpr,
):
    """values, columns [C, min(k, n)] in order; stats[:, 1] = the tail's peak; the list becomes -inf in the slab.

    lane_list [C, L] int32 and key_list [C, K] int64 pass values between threads of a program across a barrier. G >=
    lanes, L >= take_lanes, K >= take; PIECE divides L * W.
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
    candidates = chosen[:, None] * W + tl.arange(0, W)[None, :]
    held = tl.load(slab + candidates, mask=candidates < n, other=float("-inf"))
    least, spare = _least(tl.where(candidates < n, _ordered(held), -2147483648), take)
    # they are read again, a piece at a time, because the positions of all would not fit into registers
    filled = 0
    equal = 0
    for first in range(0, L * W, PIECE):
        candidate = first + tl.arange(0, PIECE)
        lane_of = tl.load(lane_list + row * L + candidate // W, mask=candidate // W < take_lanes, other=G)
        column = lane_of * W + candidate % W
        logit = tl.load(slab + column, mask=column < n, other=float("-inf"))
        logit_key = tl.where(column < n, _ordered(logit), -2147483648)
        is_equal = logit_key == least
        is_taken = (logit_key > least) | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= spare - equal))
        slot = filled + tl.cumsum(is_taken.to(tl.int32), 0) - 1
        pair = (logit_key.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
        tl.store(key_list + row * K + slot, pair, mask=is_taken)
        equal += tl.sum(is_equal.to(tl.int32), 0)
        filled += tl.sum(is_taken.to(tl.int32), 0)
    tl.debug_barrier()
    entry = tl.arange(0, K)
    whole_key = tl.load(key_list + row * K + entry, mask=entry < take, other=-9223372036854775808)
    whole_key = tl.sort(whole_key, descending=True)
    bits = (whole_key >> 32).to(tl.int32)
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    list_column = 0x7FFFFFFF - (whole_key & 0xFFFFFFFF)
    listed = tl.minimum(k, n)
    is_listed = entry < listed
    tl.store(values + row * listed + entry, value, mask=is_listed)
    tl.store(columns + row * listed + entry, list_column, mask=is_listed)
    tl.store(slab + list_column, float("-inf"), mask=is_listed)
    peak = tl.max(tl.where((entry == k) & (entry < take), value, float("-inf")), 0)
    tl.store(stats + row * stats_stride + 1, peak.to(tl.float64))


@triton.jit
def tail_sums_kernel(
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
def sort_keys_kernel(keys, width, P: tl.constexpr):
    """Each row of keys [c, width] int64 in descending order, in place."""
    entry = tl.arange(0, P)
    keys += tl.program_id(0).to(tl.int64) * width
    key = tl.load(keys + entry, mask=entry < width, other=-9223372036854775808)
    tl.store(keys + entry, tl.sort(key, descending=True), mask=entry < width)


@triton.jit
def lane_sums_kernel(slab, peaks, sums, stride, n, lanes, temperature, W: tl.constexpr, LANES: tl.constexpr):
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
def tail_sample_kernel(
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

    An entry is reached where its running sum exceeds the target or already equals the total.
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
