"""A teacher's k largest logits per token, streamed over token chunks and vocabulary shards.

T tokens, C tokens of a chunk, E teacher width, v rows of the head on this rank. Why this is exact and what it
communicates: docs/design/0008-topk-and-samples.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.divergences import check_temperature
from kdtrain_kernels.matmul import work_dtype
from kdtrain_kernels.protocol import TopKKernels
from kdtrain_kernels.topk_dispatch import topk_kernels
from kdtrain_kernels.topk_rows import NO_ID, NUMBERS, STATS, Merged, Selection, order_keys, split_keys
from torch import Tensor

from kdtrain.distributed.collectives import Group, exchange_ranks, gather_ranks
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import checks, stream
from kdtrain.losses.types import TopK
from kdtrain.losses.vocab_group import VocabGroup


@dataclass(frozen=True, slots=True)
class TopKShare(TopK):
    """A TopK of some tokens only. tokens [n] int64: their rows in the hidden states."""

    tokens: Tensor


@torch.no_grad()
def linear_topk(  # noqa: PLR0913
    hidden_t: Tensor,
    head_t: Tensor | HeadShard,
    k: int,
    *,
    shard: VocabShard,
    group: Group = None,
    temperatures: tuple[float, ...] = (1.0,),
    slab_bytes: int = stream.DEFAULT_SLAB_BYTES,
    gather: bool = True,
    backend: str = "auto",
) -> TopK:
    """The k largest logits of the teacher per token, the log-sum-exp of all logits and the log of the tail probability.

    hidden_t [T, E], replicated over `group`; head_t [v, E] (or a HeadShard with bias, scale, soft-cap), this rank's
    rows. Returns ids [T, k] int32 global, logits [T, k], lse and log_tail [T, len(temperatures)] in nats, float32
    (float64 for float64 inputs). The order is total and exact: value descending, equal values (-0.0 equals 0.0) by
    ascending id. log_tail is summed over the ids outside the k, never a difference; -inf if there are none. Logits may
    be -inf (a masked id), also among the k. Not differentiable. temperatures: one column of lse and log_tail for each.
    group, slab_bytes and backend: as in `linear_kd_loss`. Derivation: docs/design/0008-topk-and-samples.md.

    gather: results are replicated over the group. Otherwise each rank keeps the tokens that it merged and returns a
    TopKShare that names them; on rank r of R these are rows [r c, (r + 1) c) of every chunk, c = ceil(C / R).
    Memory beyond inputs and results: slab_bytes for one slab of logits, a few cache blocks, and per token of a chunk
    a few times k numbers. Results are bitwise equal for equal shapes; other chunks or numbers of ranks may round
    logits differently.
    Communicates over `group`: per chunk one all-to-all of [C, 8 min(k, v) + ...] bytes and, if gathered, one
    all-gather of as much; per call one all-gather of a number.
    Raises ValueError for invalid arguments before it computes anything, and on all ranks, at the end, for logits that
    are NaN or +inf.
    """
    head_t, vocab = stream.as_head(head_t), VocabGroup(shard, group)
    check_teacher_arguments(hidden_t, head_t, shard, slab_bytes)
    check_k("k", k, shard)
    if not temperatures:
        raise ValueError("temperatures = (), need at least one number > 0")
    for temperature in temperatures:
        check_temperature(temperature)
    kernels = topk_kernels(backend, hidden_t.device, work_dtype(hidden_t), k)
    merger = Merger(k, tuple(map(float, temperatures)), False, vocab, gather, kernels)
    parts: list[tuple[Tensor, Merged]] = []
    with torch.autocast(hidden_t.device.type, enabled=False):
        for chunk, slab, scratch in teacher_chunks(hidden_t, head_t, shard, slab_bytes):
            merged = merger.merge(merger.select(slab, scratch))
            parts.append((merger.tokens(chunk, hidden_t.device), replace(merged, ids=merged.ids.int())))
    return _collect(parts, merger, hidden_t)


def _collect(parts: list[tuple[Tensor, Merged]], merger: Merger, hidden: Tensor) -> TopK:
    """Concatenate the chunks' results. Raises ValueError for bad logits; communicates one number."""
    work = work_dtype(hidden)
    tokens = torch.cat([torch.empty(0, dtype=torch.int64, device=hidden.device), *(tokens for tokens, _ in parts)])
    bad = torch.cat([hidden.new_empty(0, dtype=torch.bool), *(merged.is_bad for _, merged in parts)])
    raise_if_bad(tokens[bad], hidden, merger.vocab.group)
    empty = hidden.new_empty(0, merger.k, dtype=work)
    numbers = hidden.new_empty(0, len(merger.temperatures), dtype=work)
    top = TopK(
        ids=torch.cat([empty.int(), *(merged.ids for _, merged in parts)]),
        logits=torch.cat([empty, *(merged.values for _, merged in parts)]),
        lse=torch.cat([numbers, *(merged.lse.to(work) for _, merged in parts)]),
        log_tail=torch.cat([numbers, *(merged.log_tail.to(work) for _, merged in parts)]),
    )
    return top if merger.gather else TopKShare(top.ids, top.logits, top.lse, top.log_tail, tokens)


def check_teacher_arguments(hidden: Tensor, head: HeadShard, shard: VocabShard, slab_bytes: int) -> None:
    """ValueError unless hidden, head and shard fit and one token's logits fit in slab_bytes."""
    checks.check_model("_t", hidden, head, shard)
    least = stream.row_stride(shard) * work_dtype(hidden).itemsize
    if not isinstance(slab_bytes, int) or slab_bytes < least:
        raise ValueError(f"slab_bytes = {slab_bytes}, need an integer of at least {least}: the logits of one token")


def check_k(name: str, k: int, shard: VocabShard) -> None:
    """ValueError unless 1 <= k <= vocabulary."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= shard.vocab_size:
        raise ValueError(f"{name} = {k}, need an integer in [1, {shard.vocab_size}], the size of the vocabulary")


def teacher_chunks(
    hidden: Tensor, head: HeadShard, shard: VocabShard, slab_bytes: int
) -> Iterator[tuple[slice, Tensor, Scratch]]:
    """(chunk, its logits [C, n] in the one slab, scratch), as many tokens at a time as fit in slab_bytes.

    The number of tokens of a chunk depends on slab_bytes and shard.rows only, so all ranks have the same chunks.
    """
    work = work_dtype(hidden)
    rows = slab_bytes // (stream.row_stride(shard) * work.itemsize)
    rows -= rows % 8 if rows >= 8 else 0
    side = stream.ModelSide.of(hidden, head, shard, rows, 1, work)
    scratch = Scratch.of(side.slabs[0])
    for first in range(0, hidden.shape[0], rows):
        chunk = slice(first, min(first + rows, hidden.shape[0]))
        yield chunk, side.logits(chunk, 0), scratch


def raise_if_bad(tokens: Tensor, hidden: Tensor, group: Group) -> None:
    """ValueError on all ranks if `tokens` (ascending) is not empty on one. Communicates one all-gather of a number."""
    none = torch.full((1,), hidden.shape[0], dtype=torch.int64, device=hidden.device)
    # Bad logits may be on one rank only; all ranks must raise, or the others would wait in a later collective.
    first = int(gather_ranks(torch.cat([tokens, none]).amin(), group).amin())
    if first < hidden.shape[0]:
        raise ValueError(
            f"the logits of hidden_t[{first}] hold NaN or +inf, need finite ones (or -inf for masked ids); "
            "look for NaN in hidden_t and head_t"
        )


@dataclass(frozen=True, slots=True)
class Merger:
    """Merges the selections of all ranks for a chunk into one list.

    Rank r merges the r-th share of the chunk's tokens; with `gather` all ranks then gather all shares.
    """

    k: int
    temperatures: tuple[float, ...]
    entropy: bool
    vocab: VocabGroup
    gather: bool
    kernels: TopKKernels

    def select(self, slab: Tensor, scratch: Scratch) -> Selection:
        """The k largest of this rank's rows; they become -inf in the slab. Does not communicate."""
        return self.kernels.topk_select(slab, self.k, self.temperatures, entropy=self.entropy, scratch=scratch)

    def tokens(self, chunk: slice, device: torch.device) -> Tensor:
        """[n] int64: the tokens of a chunk that `merge` returns."""
        count = chunk.stop - chunk.start
        if self.gather:
            return torch.arange(chunk.start, chunk.stop, device=device)
        share = -(-count // self.vocab.size)
        first = min(count, self.vocab.rank * share)
        return torch.arange(chunk.start + first, chunk.start + min(count, first + share), device=device)

    def merge(self, mine: Selection) -> Merged:
        """The merged list of `tokens`. Communicates: one all-to-all and, with `gather`, one all-gather."""
        ranks, count = self.vocab.size, len(mine.values)
        share = -(-count // ranks)
        width = min(self.k, self.vocab.shard.rows)
        values = mine.values.new_full((ranks * share, width), float("-inf"))
        ids = torch.full((ranks * share, width), NO_ID, dtype=torch.int64, device=values.device)
        stats = mine.stats.new_zeros(ranks * share, mine.stats.shape[1])
        stats[:, 1] = float("-inf")
        listed = mine.values.shape[1]
        values[:count, :listed], ids[:count, :listed] = mine.values, mine.columns + self.vocab.shard.start
        stats[:count] = mine.stats
        sent = _pack(values, ids, stats).unflatten(0, (ranks, share))
        # Every rank has candidates from its rows of the vocabulary only; each rank merges those of its share of tokens.
        got = exchange_ranks(sent, self.vocab.group)
        parts = _unpack(got, width, values.dtype, STATS + len(self.temperatures))
        merged = self.kernels.topk_merge(*parts, self.k, self.temperatures, entropy=self.entropy)
        if ranks == 1:
            return merged
        packed = _pack(merged.values, merged.ids, merged.numbers)
        if self.gather:
            # Each rank has merged its share of the tokens; the caller needs all of them.
            packed = gather_ranks(packed, self.vocab.group).flatten(0, 1)[:count]
        else:
            packed = packed[: max(0, min(share, count - self.vocab.rank * share))]
        return Merged(*_unpack(packed, self.k, values.dtype, NUMBERS + 2 * len(self.temperatures)))


def _pack(values: Tensor, ids: Tensor, numbers: Tensor) -> Tensor:
    """A list and its float64 numbers as one int64 matrix: 8 bytes per float32 entry, 16 per float64 entry."""
    entries = [order_keys(values, ids)] if values.dtype == torch.float32 else [values.view(torch.int64), ids]
    return torch.cat([*entries, numbers.contiguous().view(torch.int64)], -1)


def _unpack(packed: Tensor, width: int, dtype: torch.dtype, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values [..., width], ids [..., width], numbers [..., count]) of `_pack`."""
    numbers = packed[..., -count:].contiguous().view(torch.float64)
    if dtype == torch.float32:
        return *split_keys(packed[..., :width]), numbers
    return packed[..., :width].contiguous().view(torch.float64), packed[..., width : 2 * width], numbers
