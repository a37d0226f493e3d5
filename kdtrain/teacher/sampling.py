"""Sparse targets of a teacher's distribution per token: exact ids, a tail bucket, unbiased draws.

T tokens, C tokens of a chunk, E teacher width, v rows of the head on this rank, K = k slots per token. What each
estimator keeps, why the draws are unbiased and how they are generated: docs/design/0008-topk-and-samples.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.counter import MAX_SEED, uniform
from kdtrain_kernels.divergences import check_temperature
from kdtrain_kernels.matmul import work_dtype
from kdtrain_kernels.topk_dispatch import topk_kernels
from kdtrain_kernels.topk_rows import Merged, Selection
from torch import Tensor

from kdtrain.distributed.collectives import Group, gather_ranks, reduce_sum_
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import stream
from kdtrain.losses.types import SparseTarget
from kdtrain.losses.vocab_group import VocabGroup
from kdtrain.teacher.estimators import UNBIASED, WITH_TAIL, Estimator, Split
from kdtrain.teacher.topk import Merger, check_k, check_teacher_arguments, raise_if_bad, teacher_chunks


@torch.no_grad()
def sample_targets(  # noqa: PLR0913
    hidden_t: Tensor,
    head_t: Tensor | HeadShard,
    *,
    estimator: str,
    k: int,
    seed: int,
    sample_ids: Tensor,
    positions: Tensor,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    shard: VocabShard,
    group: Group = None,
    tail_samples: int | None = None,
    top_p: float | None = None,
    slab_bytes: int = stream.DEFAULT_SLAB_BYTES,
    backend: str = "auto",
) -> SparseTarget:
    """At most k distinct ids per token with weights that, with the tail bucket if there is one, sum to 1.

    p = softmax(logits / temperature). hidden_t [T, E], replicated over `group`; head_t [v, E] (or a HeadShard), this
    rank's rows; sample_ids and positions [T] int64 identify each token: its draws depend only on (seed, sample id,
    position) and p, so up to rounding of logits they are the same in any batch, chunk or layout. labels [T] global ids
    or None. estimator: see `kdtrain.teacher.estimators.ESTIMATORS`; tail_samples belongs to top_k_samples, top_p to
    top_p_k, and other estimators refuse them. group, slab_bytes and backend: as in `linear_kd_loss`. Estimators and
    papers: docs/design/0008-topk-and-samples.md.

    Returns, replicated: ids [T, k] int32, first the exact ones in descending order of probability, then drawn ones in
    ascending order of ids; empty slots, also between drawn ids, have id -1 and weight 0; weights [T, k]; log_tail [T]
    or None; label_log_prob [T], log p at temperature 1 (0 where there is no label); entropy [T] of p over the whole
    vocabulary, nats, at `temperature`. Weights and numbers are float32 (float64 for float64 inputs). unbiased: the
    expectation of the weights over seeds is p. Not differentiable.

    Memory beyond inputs and results: slab_bytes for one slab of logits, a tenth of it for running sums, a few cache
    blocks and per token of a chunk a few times k numbers.
    Communicates over `group`: per chunk one all-to-all and one all-gather of lists and, if the estimator draws, one
    all-gather of [C, 1]; per call one all-reduce of [T, k] (if it draws), one of [T] and one all-gather of a number.
    Raises ValueError for invalid arguments before it computes anything, and on all ranks, at the end, for logits that
    are NaN or +inf.
    """
    head_t, vocab = stream.as_head(head_t), VocabGroup(shard, group)
    check_teacher_arguments(hidden_t, head_t, shard, slab_bytes)
    check_k("k", k, shard)
    check_temperature(temperature)
    chosen = Estimator.of(estimator, k, tail_samples, top_p)
    _check_tokens(seed, {"sample_ids": sample_ids, "positions": positions, "labels": labels}, hidden_t)
    kernels = topk_kernels(backend, hidden_t.device, work_dtype(hidden_t), max(chosen.list_length, chosen.most_draws))
    temperatures = (float(temperature),) if temperature == 1.0 else (float(temperature), 1.0)
    merger = Merger(chosen.list_length, temperatures, True, vocab, True, kernels)
    sampler = _Sampler(chosen, merger, _Results.empty(hidden_t, chosen))
    offsets = uniform(seed, sample_ids, positions)
    if labels is None:
        labels = torch.full_like(sample_ids, -1)
    columns = stream.local_labels(labels, shard)
    with torch.autocast(hidden_t.device.type, enabled=False):
        for chunk, slab, scratch in teacher_chunks(hidden_t, head_t, shard, slab_bytes):
            sampler.results.label[chunk] = _picked(slab, columns[chunk])
            sampler.take(chunk, slab, offsets[chunk], scratch)
    return sampler.result(hidden_t, stream.is_token(labels, shard))


def _check_tokens(seed: int, tensors: dict[str, Tensor | None], hidden: Tensor) -> None:
    """A seed of 63 bits and one int64 per token (labels may be int32)."""
    if not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed = {seed}, need an integer in [0, 2^63)")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != hidden.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, need ({hidden.shape[0]},): one per token")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, need {hidden.device} as hidden_t")
        allowed = (torch.int64, torch.int32) if name == "labels" else (torch.int64,)
        if tensor.dtype not in allowed:
            raise ValueError(f"{name} has dtype {tensor.dtype}, need {' or '.join(map(str, allowed))}")


def _picked(slab: Tensor, columns: Tensor) -> Tensor:
    """[C] float64 logits at columns [C], 0 where a column is -1."""
    if slab.shape[1] == 0:
        return torch.zeros(len(slab), dtype=torch.float64, device=slab.device)
    return slab.gather(1, columns.clamp(min=0)[:, None])[:, 0].double().where(columns >= 0, 0.0)


@dataclass(frozen=True, slots=True)
class _Results:
    """Per token: kept ids and weights [T, k], this rank's draws [T, m] as id + 1 (0: none or another rank's), and
    numbers [T]: weight of a draw, log of the tail, entropy, lse at temperature 1, label's logit, error flag."""

    ids: Tensor
    weights: Tensor
    drawn: Tensor
    draw_weight: Tensor
    log_tail: Tensor
    entropy: Tensor
    lse: Tensor
    label: Tensor
    bad: Tensor

    @classmethod
    def empty(cls, hidden: Tensor, estimator: Estimator) -> _Results:
        """For all tokens, without kept or drawn ids."""
        num_tokens, device = hidden.shape[0], hidden.device

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_tokens, *shape, dtype=dtype, device=device)

        return cls(
            ids=zeros(estimator.k, dtype=torch.int32).sub_(1),
            weights=zeros(estimator.k, dtype=work_dtype(hidden)),
            drawn=zeros(estimator.most_draws, dtype=torch.int32),
            draw_weight=zeros(dtype=torch.float64),
            log_tail=zeros(dtype=torch.float64),
            entropy=zeros(dtype=torch.float64),
            lse=zeros(dtype=torch.float64),
            label=zeros(dtype=torch.float64),
            bad=zeros(dtype=torch.bool),
        )


@dataclass(frozen=True, slots=True)
class _Sampler:
    """State that the chunks of one call share."""

    estimator: Estimator
    merger: Merger
    results: _Results

    def take(self, chunk: slice, slab: Tensor, offsets: Tensor, scratch: Scratch) -> None:
        """A chunk's logits [C, n] (overwritten) and offsets [C] in [0, 1) -> its rows of the results."""
        selection = self.merger.select(slab, scratch)
        merged = self.merger.merge(selection)
        lse = merged.lse[:, :1]
        log_p = merged.values.double() / self.merger.temperatures[0] - lse
        split = self.estimator.split(log_p.where(lse > -torch.inf, -torch.inf), merged.log_tail[:, 0])
        results, length = self.results, self.estimator.list_length
        is_kept = torch.arange(length, device=slab.device) < split.kept[:, None]
        is_kept &= merged.values > -torch.inf
        results.ids[chunk, :length] = merged.ids.int().where(is_kept, -1)
        results.weights[chunk, :length] = split.weights.to(slab.dtype)
        results.draw_weight[chunk] = split.log_rest.exp() / split.draws.clamp(min=1)
        results.log_tail[chunk] = split.log_rest
        results.entropy[chunk] = merged.entropy
        results.lse[chunk] = merged.lse[:, -1]
        results.bad[chunk] = merged.is_bad
        if self.estimator.most_draws:
            results.drawn[chunk] = self._draw(slab, offsets, scratch, selection, merged, split).int()

    def _draw(
        self, slab: Tensor, offsets: Tensor, scratch: Scratch, selection: Selection, merged: Merged, split: Split
    ) -> Tensor:
        """[C, m] int64 id + 1 of the draws that fall on this rank's columns, else 0. One all-gather of [C]."""
        kernels, temperature, vocab = self.merger.kernels, self.merger.temperatures[0], self.merger.vocab
        kernels.restore(
            slab, selection, _is_kept(selection.values, selection.columns + vocab.shard.start, merged, split)
        )
        peak = _rest_peak(merged, split)
        cdf = kernels.tail_cdf(slab, peak, temperature, scratch=scratch)
        mass = cdf[:, -1] if cdf.shape[1] else cdf.new_zeros(len(cdf))
        # Every rank needs the others' tail mass to place its own interval of the distribution function. All ranks add
        # the same numbers in the same order, so the intervals meet exactly and each draw falls on exactly one rank.
        ends = gather_ranks(mass, vocab.group).cumsum(0)
        end = ends[vocab.rank]
        start = torch.cat([torch.zeros_like(ends[:1]), ends])[vocab.rank]
        total = ends[-1][:, None]
        slots = torch.arange(self.estimator.k - self.estimator.most_draws, self.estimator.k, device=slab.device)
        number = slots - split.kept[:, None]
        targets = (offsets[:, None] + number) / split.draws.clamp(min=1)[:, None] * total
        targets = torch.minimum(targets, torch.nextafter(total, torch.zeros_like(total)))
        is_mine = (number >= 0) & (number < split.draws[:, None])
        is_mine &= (targets >= start[:, None]) & (targets < end[:, None])
        columns = kernels.tail_sample(slab, cdf, (targets - start[:, None]).clamp(min=0.0), peak, temperature)
        return (columns + (vocab.shard.start + 1)).where(is_mine, 0)

    def result(self, hidden: Tensor, has_label: Tensor) -> SparseTarget:
        """Complete draws and labels over the group, and build the result. Communicates: see `sample_targets`."""
        results, estimator, group = self.results, self.estimator, self.merger.vocab.group
        raise_if_bad(results.bad.nonzero()[:, 0], hidden, group)
        if estimator.most_draws:
            # Each draw was found by the one rank whose rows hold it; the others have 0.
            drawn = reduce_sum_(results.drawn, group) - 1
            first = estimator.k - estimator.most_draws
            _add_draws(results.ids[:, first:], results.weights[:, first:], drawn, results.draw_weight)
        # The label's logit is on the one rank that holds its row; the others have 0.
        label = reduce_sum_(results.label, group)
        work = results.weights.dtype
        return SparseTarget(
            ids=results.ids,
            weights=results.weights,
            log_tail=results.log_tail.to(work) if estimator.name in WITH_TAIL else None,
            label_log_prob=(label - results.lse).where(has_label, 0.0).to(work),
            entropy=results.entropy.to(work),
            unbiased=estimator.name in UNBIASED,
        )


def _is_kept(values: Tensor, ids: Tensor, merged: Merged, split: Split) -> Tensor:
    """[C, w] bool: which of a rank's entries are among the first `kept` of all."""
    last = (split.kept - 1).clamp(min=0)[:, None]
    value, last_id = merged.values.gather(1, last), merged.ids.gather(1, last)
    return (split.kept[:, None] > 0) & ((values > value) | ((values == value) & (ids <= last_id)))


def _rest_peak(merged: Merged, split: Split) -> Tensor:
    """[C] float64: the largest logit that is not kept."""
    length = merged.values.shape[1]
    following = merged.values.gather(1, split.kept.clamp(max=length - 1)[:, None])[:, 0].double()
    return following.where(split.kept < length, merged.tail_peak)


def _add_draws(ids: Tensor, weights: Tensor, drawn: Tensor, weight: Tensor) -> None:
    """Write draws [T, m] (-1: none), ascending along their slots, into ids and weights [T, m]; one slot per id.

    weight [T]: of one draw. The slot of an id's first draw takes the weight of all of them.
    """
    is_draw = drawn >= 0
    is_new = is_draw.clone()
    is_new[:, 1:] &= drawn[:, 1:] != drawn[:, :-1]
    slots = torch.arange(drawn.shape[1], device=drawn.device)
    slot_of_first = slots.where(is_new, 0).cummax(1).values
    counts = torch.zeros_like(weights).scatter_add_(1, slot_of_first, is_draw.to(weights.dtype))
    ids.copy_(drawn.where(is_new, ids))
    weights.copy_((counts.double() * weight[:, None]).to(weights.dtype).where(is_new, weights))
