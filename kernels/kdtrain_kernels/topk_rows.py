"""Row kernels in torch: the k largest logits of a row, statistics of the rest (the tail), and draws from it.

C rows of a chunk, n columns: the real tokens among this rank's vocabulary rows (n may be 0). Slabs are float32 or
float64 with any row stride. Ids and columns are int64 here. The order is total: larger value first, and among equal
values (-0.0 equals 0.0) the smaller id. No function communicates. Derivation: docs/design/0008-topk-and-samples.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdtrain_kernels.blocks import FLOOR, Scratch, finite, row_blocks

NO_ID = (1 << 31) - 1
"""Id of an empty entry; with the value -inf it is ordered after every real one."""
SELECT_BLOCK = 1 << 20
"""Slab elements per block of the selection: few calls, and the gathered lanes stay small."""
SAMPLE_LANE = 32
"""Neighbouring columns that share an entry of the coarse distribution function used to look up draws."""
STATS = 3
"""Columns of `Selection.stats` before one sum per temperature."""
NUMBERS = 3
"""Columns of `Merged.numbers` before two per temperature."""


@dataclass(frozen=True, slots=True)
class Selection:
    """One rank's part of a chunk.

    values [C, w] and columns [C, w], w = min(k, n), in order. stats [C, STATS + len(temperatures)] float64: 1 where
    the row holds NaN or +inf; the peak c of the columns outside the list (-inf if there is none); sum e^y y and
    sum e^y with y = (s - c) / temperatures[0]; sum e^y at every other temperature. All sums run over the columns
    outside the list; the first is 0 unless requested.
    """

    values: Tensor
    columns: Tensor
    stats: Tensor


@dataclass(frozen=True, slots=True)
class Merged:
    """The first k of all ranks' entries and statistics of the rest.

    values [c, k], ids [c, k]; numbers [c, NUMBERS + 2 * len(temperatures)] float64: the error flag, the peak outside
    the list, the entropy at temperatures[0] (nats; 0 unless requested), then per temperature the log-sum-exp over the
    whole vocabulary, then per temperature the log of the probability outside the list.
    """

    values: Tensor
    ids: Tensor
    numbers: Tensor

    @property
    def is_bad(self) -> Tensor:
        """[c] bool: whether any rank's row held NaN or +inf."""
        return self.numbers[:, 0] != 0

    @property
    def tail_peak(self) -> Tensor:
        """[c] largest logit outside the list, -inf if there is none."""
        return self.numbers[:, 1]

    @property
    def entropy(self) -> Tensor:
        """[c] nats, at the first temperature."""
        return self.numbers[:, 2]

    @property
    def lse(self) -> Tensor:
        """[c, len(temperatures)]"""
        return self.numbers[:, NUMBERS:].chunk(2, 1)[0]

    @property
    def log_tail(self) -> Tensor:
        """[c, len(temperatures)]"""
        return self.numbers[:, NUMBERS:].chunk(2, 1)[1]


def order_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that are larger the earlier (value, id) comes in the order. values float32, 0 <= ids <= NO_ID."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0
    ordered = bits ^ ((bits >> 31) & NO_ID)
    return (ordered.long() << 32) | (NO_ID - ids)


def split_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The (values, ids) of `order_keys`."""
    ordered = (keys >> 32).to(torch.int32)
    values = (ordered ^ ((ordered >> 31) & NO_ID)).view(torch.float32)
    return values, NO_ID - (keys & 0xFFFFFFFF)


def first_k(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """[b, k] int64 positions in [b, m] of the first k entries, in order. (value, id) pairs are distinct."""
    if values.dtype == torch.float32:
        return torch.topk(order_keys(values, ids), k, dim=1).indices
    by_id = ids.argsort(dim=1, stable=True)
    by_value = values.gather(1, by_id).argsort(dim=1, descending=True, stable=True)
    return by_id.gather(1, by_value[:, :k])


def topk_select(slab: Tensor, k: int, temperatures: tuple[float, ...], *, entropy: bool, scratch: Scratch) -> Selection:
    """Each row's first min(k, n) entries and sums over all others. The list's entries become -inf in the slab.

    `entropy`: also sum e^y y. Reads the slab twice. Does not raise: NaN and +inf set a flag.
    """
    num_rows, n = slab.shape
    width = min(k, n)
    values = slab.new_empty(num_rows, width)
    columns = torch.empty(num_rows, width, dtype=torch.int64, device=slab.device)
    stats = torch.zeros(num_rows, STATS + len(temperatures), dtype=torch.float64, device=slab.device)
    stats[:, 1] = float("-inf")
    if n == 0:
        return Selection(values, columns, stats)
    step = max(1, SELECT_BLOCK // n)
    for first in range(0, num_rows, step):
        rows = slice(first, first + step)
        found, places, peak = _first_columns(slab[rows], min(k + 1, n))
        stats[rows, 0] = (~(peak < math.inf)).double()
        if n > k:
            stats[rows, 1] = found[:, k].double()
        values[rows], columns[rows] = found[:, :k], places[:, :k]
        slab[rows].scatter_(1, places[:, :k], float("-inf"))
    if n > k:
        for rows in row_blocks(slab, scratch):
            _tail_sums(slab[rows], stats[rows], temperatures, entropy, scratch)
    return Selection(values, columns, stats)


def _first_columns(block: Tensor, take: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values [b, take], columns [b, take], maxima [b]) of the first `take` entries of each row.

    A lane is a few neighbouring columns. The entries lie in the first `take` lanes by (maximum, position): each of
    those lanes holds an entry that is ordered before all entries of any other lane, ties included, because lanes are in
    id order.
    """
    n = block.shape[1]
    lane = _lane_width(n, take)
    columns = torch.arange(n, device=block.device).expand(len(block), -1)
    if lane == 1:
        candidates, peak = block, block.amax(1)
    else:
        maxima = torch.cat([part.amax(-1) for part in _lanes(block, lane)], 1)
        peak = maxima.amax(1)
        lanes = first_k(maxima, columns[:, : maxima.shape[1]], take)
        columns = (lanes[:, :, None] * lane + torch.arange(lane, device=block.device)).flatten(1)
        candidates = block.gather(1, columns.clamp(max=n - 1)).masked_fill_(columns >= n, float("-inf"))
    places = first_k(candidates, columns, take)
    return candidates.gather(1, places).add_(0.0), columns.gather(1, places), peak


def _lane_width(n: int, take: int) -> int:
    """Columns of a lane. About as many lanes as candidates is cheapest; below 16 columns, maxima are slow.

    Returns 1 if there are too few columns for lanes.
    """
    if n < 32 * take:
        return 1
    return min(64, max(16, 1 << round(math.log2(n / take) / 2)))


def _lanes(block: Tensor, lane: int) -> Iterator[Tensor]:
    """[b, lanes, lane] of the whole lanes, then [b, 1, rest] of the remainder; views."""
    whole = block.shape[1] // lane * lane
    if whole:
        yield block[:, :whole].reshape(len(block), whole // lane, lane)
    if whole < block.shape[1]:
        yield block[:, None, whole:]


def _tail_sums(block: Tensor, stats: Tensor, temperatures: tuple[float, ...], entropy: bool, scratch: Scratch) -> None:
    """Fill the sums of `Selection.stats` [b, ...] from a block whose listed entries are -inf."""
    x = torch.sub(block, finite(stats[:, 1]).to(block.dtype)[:, None], out=scratch.take(0, len(block)))
    if entropy:
        y = torch.div(x, temperatures[0], out=scratch.take(1, len(block))).clamp_(min=FLOOR)
        power = torch.exp(y, out=scratch.take(2, len(block)))
        stats[:, STATS] = power.sum(1).double()
        stats[:, 2] = power.mul_(y).sum(1).double()
    for place, temperature in enumerate(temperatures):
        if place == 0 and entropy:
            continue
        last = place == len(temperatures) - 1
        y = x if last else torch.div(x, temperature, out=scratch.take(1, len(block)))
        if last and temperature != 1.0:
            y.div_(temperature)
        stats[:, STATS + place] = y.exp_().sum(1).double()


def topk_merge(
    values: Tensor, ids: Tensor, stats: Tensor, k: int, temperatures: tuple[float, ...], *, entropy: bool
) -> Merged:
    """All ranks' selections of the same c rows -> the first k of their entries.

    values, ids [ranks, c, w]: the lists, ids global, filled up with (-inf, NO_ID); stats [ranks, c, ...]. The tail is
    the ranks' sums plus the listed entries that are not among the first k; nothing is subtracted from a total.
    """
    values, ids = values.transpose(0, 1).flatten(1), ids.transpose(0, 1).flatten(1)
    if stats.shape[0] == 1:  # the list of a single rank is already in order
        return Merged(values, ids, merged_numbers(values, values[:, :0], stats, temperatures, entropy=entropy))
    places = first_k(values, ids, k)
    lost = values.scatter(1, places, float("-inf"))
    numbers = merged_numbers(values.gather(1, places), lost, stats, temperatures, entropy=entropy)
    return Merged(values.gather(1, places), ids.gather(1, places), numbers)


def merged_numbers(
    top: Tensor, lost: Tensor, stats: Tensor, temperatures: tuple[float, ...], *, entropy: bool
) -> Tensor:
    """`Merged.numbers` from the first k values [c, k], the other listed values [c, any] (-inf: none) and all stats."""
    top, lost = top.double(), lost.double()
    peaks = stats[:, :, 1]
    log_sums = stats[:, :, STATS:].log()
    scales = torch.stack([top.new_full((), temperature) for temperature in temperatures])  # fills do not synchronise
    outside = torch.cat([lost[:, :, None] / scales, (peaks[:, :, None] / scales + log_sums).transpose(0, 1)], 1)
    tail = outside.logsumexp(1)
    lse = torch.logaddexp(tail, (top[:, :, None] / scales).logsumexp(1))
    numbers = top.new_zeros(len(top), NUMBERS)
    numbers[:, 0] = stats[:, :, 0].amax(0)
    numbers[:, 1] = torch.cat([peaks, lost.T]).amax(0)
    if entropy:
        numbers[:, 2] = _entropy(torch.cat([top, lost], 1) / temperatures[0], stats, temperatures[0], lse[:, 0])
    log_tail = (tail - lse).where(tail > float("-inf"), float("-inf"))
    return torch.cat([numbers, lse, log_tail], 1)


def _entropy(listed: Tensor, stats: Tensor, temperature: float, lse: Tensor) -> Tensor:
    """-sum p log p [c] from all listed logits over the temperature [c, m] and the sums over all others."""
    log_p = listed - finite(lse)[:, None]
    of_list = (log_p.exp() * log_p.clamp(min=FLOOR)).sum(1)
    offset = finite(stats[:, :, 1] / temperature) - finite(lse)
    of_tail = offset.clamp(max=0.0).exp() * (stats[:, :, 2] + offset * stats[:, :, STATS])
    return -(of_list + of_tail.sum(0)).clamp(max=0.0)


def restore(slab: Tensor, selection: Selection, keep: Tensor) -> None:
    """Write the selection's entries back into the slab except where keep [C, w] is true, which stay -inf."""
    slab.scatter_(1, selection.columns, selection.values.masked_fill(keep, float("-inf")))


def tail_cdf(slab: Tensor, peak: Tensor, temperature: float, *, scratch: Scratch) -> Tensor:
    """[C, lanes] float64: running sums, in the order of columns, of exp((s - peak) / temperature) over whole lanes.

    peak [C] float64: the largest drawable logit on any rank; -inf if there is none.
    """
    lanes = -(-slab.shape[1] // SAMPLE_LANE)
    cdf = torch.zeros(len(slab), lanes, dtype=torch.float64, device=slab.device)
    for rows in row_blocks(slab, scratch) if lanes else ():
        shift = finite(peak[rows]).to(slab.dtype)[:, None]
        power = torch.sub(slab[rows], shift, out=scratch.take(0, len(slab[rows])))
        if temperature != 1.0:
            power.div_(temperature)
        power.exp_()
        sums = torch.cat([part.sum(-1) for part in _lanes(power, SAMPLE_LANE)], 1)
        torch.cumsum(sums, 1, dtype=torch.float64, out=cdf[rows])
    return cdf


def tail_sample(slab: Tensor, cdf: Tensor, targets: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """[C, m] int64 columns at which the distribution function of the rows reaches targets [C, m] float64.

    cdf and peak as for `tail_cdf`; targets in [0, cdf[:, -1]); others are clamped to the nearer end. A column of
    probability 0 is drawn only if no column has any. Columns ascend where targets do.
    """
    found = torch.zeros(targets.shape, dtype=torch.int64, device=slab.device)
    step = max(1, SELECT_BLOCK // (SAMPLE_LANE * max(1, targets.shape[1])))
    for first in range(0, len(slab), step) if slab.shape[1] else ():
        rows = slice(first, first + step)
        found[rows] = _look_up(slab[rows], cdf[rows], targets[rows], finite(peak[rows]), temperature)
    return found


def _look_up(block: Tensor, cdf: Tensor, targets: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """`tail_sample` of a block: find the lane, then the column in it."""
    n = block.shape[1]
    lanes = _reaching(cdf, targets)
    before = cdf.gather(1, (lanes - 1).clamp(min=0)).where(lanes > 0, 0.0)
    columns = lanes[:, :, None] * SAMPLE_LANE + torch.arange(SAMPLE_LANE, device=block.device)
    logits = block.gather(1, columns.clamp(max=n - 1).flatten(1)).view(columns.shape)
    power = ((logits - peak.to(logits.dtype)[:, None, None]) / temperature).exp_()
    inner = power.double().masked_fill_(columns >= n, 0.0).cumsum(2)
    inside = _reaching(inner.flatten(0, 1), (targets - before).reshape(-1, 1))
    return (lanes * SAMPLE_LANE + inside.view(targets.shape)).clamp(max=n - 1)


def _reaching(running: Tensor, targets: Tensor) -> Tensor:
    """First index whose running sum [b, m] exceeds targets [b, t], at most the first that reaches the total.

    In both cases the entry there is positive if any is: rounding can move a draw, but never onto an impossible column.
    """
    reached = torch.searchsorted(running, targets.contiguous(), right=True)
    return torch.minimum(reached, torch.searchsorted(running, running[:, -1:].contiguous()))
