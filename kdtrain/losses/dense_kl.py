"""Distillation from a full teacher distribution: loss and gradients from the hidden states of both models.

Streamed over token chunks and vocabulary shards; neither model's [T, V] logits ever exist. One all-gather of ten
numbers per token and rank merges the statistics, a second one of one number follows for the divergences that need it.
Derivation: docs/design/0004-streamed-loss.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.dispatch import pair_kernels
from kdtrain_kernels.divergences import DivergenceSpec
from kdtrain_kernels.matmul import work_dtype
from kdtrain_kernels.torch_rows import PairTotals
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdtrain.distributed.collectives import Group, gather_ranks, start_gather
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import checks, stream
from kdtrain.losses.arguments import spec_of
from kdtrain.losses.types import LossParts


def linear_kd_loss(
    hidden_s: Tensor,
    head_s: Tensor | HeadShard,
    hidden_t: Tensor,
    head_t: Tensor | HeadShard,
    labels: Tensor,
    *,
    divergence: str | DivergenceSpec,
    temperature: float = 1.0,
    kd_weight: Tensor,
    ce_weight: Tensor,
    shard: VocabShard,
    group: Group = None,
    slab_bytes: int = stream.DEFAULT_SLAB_BYTES,
    teacher_share: float = 0.5,
    skew: float = 0.1,
    ab_alpha: float = 0.5,
    ab_beta: float = 0.5,
    measure: bool = False,
    z_weight: Tensor | None = None,
    main_grad: Tensor | None = None,
    backend: str = "auto",
) -> LossParts:
    """sum_t kd_weight[t] temperature^2 D[t] + ce_weight[t] CE[t], with D the divergence of `losses.reference`.

    hidden_s [T, D] and hidden_t [T, E], replicated over `group`; head_s [v, D] and head_t [v, E] (or HeadShards), this
    rank's rows of both heads, sharded alike; labels [T] global ids, any value where ce_weight is 0; weights [T],
    constants. The teacher's arguments never receive a gradient. divergence: a name, for which temperature and the
    parameters of that divergence are read, or a `divergence_spec`, which has them (they must be left out then).
    With `measure`, LossParts also has entropies, KL at temperature 1, total variation and top-1 agreement per token
    (one more reading of both logits). z_weight and main_grad as in `linear_cross_entropy`. Everything returned is
    replicated over the group; values in nats. group: the ranks that hold the other rows of the vocabulary, None for
    one rank. slab_bytes: memory for both models' logits of a chunk of C tokens. backend: "auto", "torch" or "triton"
    row kernels. Derivation: docs/design/0004-streamed-loss.md; papers: the functions of `losses.reference`.

    Where kd_weight is 0 everywhere, loss and gradients are bitwise those of `linear_cross_entropy`.
    Memory beyond inputs and gradients: slab_bytes and a few cache blocks. Gradients accumulate in float32 (float64) and
    are kept so until backward, which scales and rounds them into new tensors: d(hidden_s) complete on every rank,
    d(head_s) of this rank's rows, 0 in padding rows. Under no_grad no gradient is computed. Communicates over `group`:
    per chunk one all-gather of [C, 10] (and one of [C, 1] for all but forward_kl and reverse_kl; one of [C, 4] to
    measure); per call one all-gather of [T, 1] ([T, 5] to measure) and, if hidden_s needs a gradient, one all-reduce of
    [T, D]; nothing in backward. Raises ValueError for inconsistent arguments before anything is computed.
    """
    head_s, head_t = stream.as_head(head_s), stream.as_head(head_t)
    checks.check_shard(shard, group)
    checks.check_model("_s", hidden_s, head_s, shard)
    checks.check_model("_t", hidden_t, head_t, shard)
    checks.check_teacher(hidden_s, hidden_t)
    weights = {"kd_weight": kd_weight, "ce_weight": ce_weight}
    checks.check_labels_and_weights(labels, weights if z_weight is None else weights | {"z_weight": z_weight}, hidden_s)
    checks.check_slab_bytes(slab_bytes, shard, group, work_dtype(hidden_s, hidden_t))
    checks.check_main_grad(main_grad, head_s.weight, work_dtype(hidden_s, hidden_t))
    parameters = {"teacher_share": teacher_share, "skew": skew, "ab_alpha": ab_alpha, "ab_beta": ab_beta}
    spec = spec_of(divergence, temperature, parameters)
    kernels = pair_kernels(backend, hidden_s.device, work_dtype(hidden_s, hidden_t), spec)
    checks.check_label_range(labels, ce_weight, shard)
    call = _Call(
        head_s=head_s,
        hidden_t=hidden_t.detach(),
        head_t=head_t,
        labels=labels,
        weights=stream.TokenWeights.of(kd_weight, ce_weight, z_weight, stream.local_labels(labels, shard)),
        spec=spec,
        shard=shard,
        group=group,
        slab_bytes=slab_bytes,
        main_grad=main_grad,
        measure=measure,
        needs_grad=stream.NeedsGrad.of(hidden_s, head_s),
        kernels=kernels,
    )
    with torch.autocast(hidden_s.device.type, enabled=False):
        loss, table = _LinearKd.apply(hidden_s, head_s.weight, head_s.bias, call)
    names = _FIELDS if measure else _ALWAYS
    return LossParts(loss=loss, **{name: table[_FIELDS.index(name)] for name in names})


_FIELDS = ("lse", "ce", "teacher_ce", "agreement", "kd", "student_entropy", "teacher_entropy", "forward_kl", "tvd")
"""Rows of the table that the Function returns: fields of LossParts. From "kd" on they are sums over columns; each rank
holds a partial sum until the end of the call."""
_LSE, _CE, _TEACHER_CE, _AGREEMENT, _KD, _STUDENT_ENTROPY, _TEACHER_ENTROPY, _FORWARD_KL, _TVD = range(9)
_ALWAYS = ("lse", "ce", "teacher_ce", "kd")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    head_s: HeadShard
    hidden_t: Tensor
    head_t: HeadShard
    labels: Tensor
    weights: stream.TokenWeights
    spec: DivergenceSpec
    shard: VocabShard
    group: Group
    slab_bytes: int
    main_grad: Tensor | None
    measure: bool
    needs_grad: stream.NeedsGrad
    kernels: ModuleType


PendingChunk = tuple[tuple[Tensor, Tensor], Callable[[], Tensor]]
"""A chunk's student and teacher logits, and a function that waits for the statistics of all ranks."""


class _LinearKd(torch.autograd.Function):
    """Computes gradients in forward, so that only d(hidden) and d(head) are kept for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        work = work_dtype(hidden, call.hidden_t)
        rows = stream.chunk_rows(call.slab_bytes, call.shard, call.group, work)
        depth = stream.in_flight(call.group)
        student = stream.ModelSide.of(hidden, call.head_s, call.shard, rows, depth, work)
        teacher = stream.ModelSide.of(call.hidden_t, call.head_t, call.shard, rows, depth, work)
        scratch = Scratch.of(student.slabs[0])
        grads = stream.GradientBuffers.zeros(hidden, call.head_s, call.needs_grad, work, call.main_grad)
        table = torch.zeros(len(_FIELDS) + 1, hidden.shape[0], dtype=torch.float64, device=hidden.device)

        def issue(chunk: slice, slot: int) -> PendingChunk:
            slabs = student.logits(chunk, slot), teacher.logits(chunk, slot)
            stats = call.kernels.pair_stats(*slabs, call.weights.columns[chunk], spec=call.spec, scratch=scratch)
            # The softmax needs the maxima and sums of all ranks' rows.
            return slabs, start_gather(stats, call.group)

        def complete(chunk: slice, pending: PendingChunk) -> None:
            slabs, gathered = pending
            totals = call.kernels.merge_pair_stats(gathered(), call.spec, call.shard.vocab_size)
            totals = _divergence_of_chunk(call, slabs, totals, table[:, chunk], scratch)
            if call.needs_grad.any:
                weights = call.weights.of_chunk(chunk, table[_LSE, chunk])
                value, operand = call.kernels.pair_grad(
                    *slabs,
                    totals,
                    weights,
                    spec=call.spec,
                    logit_map=student.logit_map,
                    scratch=scratch,
                    operand_dtype=student.operand_dtype,
                )
                table[_KD, chunk] += value
                grads.add(student, chunk, operand)

        stream.run_pipelined(hidden.shape[0], rows, depth, issue, complete)
        _sum_over_ranks(call, table)
        loss = call.weights.loss(table[_LSE], table[_CE], call.spec.temperature**2 * table[_KD]).to(work)
        stream.save_gradients(ctx, grads, (hidden, weight, bias), call.group, call.main_grad)
        fields = table[:-1].to(work)
        ctx.mark_non_differentiable(fields)
        return loss, fields

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_table: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*stream.scaled_gradients(ctx, grad_loss), None)


def _divergence_of_chunk(
    call: _Call, slabs: tuple[Tensor, Tensor], totals: PairTotals, table: Tensor, scratch: Scratch
) -> PairTotals:
    """Fill a chunk's columns of the table with the values that need no gradient; returns the totals including Z."""
    kernels, spec = call.kernels, call.spec
    table[_CE], table[_LSE] = totals.student.label_nll(), totals.student.lse()
    table[_TEACHER_CE] = totals.teacher.label_nll()
    if call.measure:
        _measure(call, slabs, totals, table, scratch)
    if spec.row.two_rounds:
        parts = kernels.pair_round2(*slabs, totals, spec=spec, scratch=scratch)
        # Each rank has the part of Z of its own rows. A gather and a sum in rank order: equal bits on all ranks.
        totals = replace(totals, z=gather_ranks(parts[:, 0], call.group).sum(0))
        table[_KD] = parts[:, 1]
    elif not call.needs_grad.any:
        table[_KD] = kernels.pair_value(*slabs, totals, spec=spec, scratch=scratch)
    table[-1] = totals.z
    return totals


def _measure(call: _Call, slabs: tuple[Tensor, Tensor], totals: PairTotals, table: Tensor, scratch: Scratch) -> None:
    """Fill the measured values that do not enter the loss.

    Entropies are log sum exp(x) - sum q x; one rank adds the first term.
    """
    parts = call.kernels.pair_measure(*slabs, totals, call.spec.temperature, scratch=scratch)
    first = 0 if call.shard.start else 1  # exactly one rank of a group owns id 0
    table[_STUDENT_ENTROPY] = first * totals.student.log_sum - parts[:, 0]
    table[_TEACHER_ENTROPY] = first * totals.teacher.log_sum - parts[:, 1]
    table[_FORWARD_KL] = parts[:, 2]
    table[_TVD] = parts[:, 3]
    table[_AGREEMENT] = _agreement(call, slabs, scratch)


def _agreement(call: _Call, slabs: tuple[Tensor, Tensor], scratch: Scratch) -> Tensor:
    """[C] 1 where both models' largest logit belongs to the same id, ties to the smaller id. One all-gather [C, 4]."""
    found = torch.cat([call.kernels.first_argmax(slab, scratch) for slab in slabs], 1)
    found[:, 1::2] += call.shard.start
    # The largest logit may be on any rank.
    gathered = gather_ranks(found, call.group)
    peaks, ids = gathered[:, :, 0::2], gathered[:, :, 1::2]
    winners = ids.where(peaks == peaks.amax(0), float("inf")).amin(0)
    return (winners[:, 0] == winners[:, 1]).double()


def _sum_over_ranks(call: _Call, table: Tensor) -> None:
    """Sum the ranks' partial sums in rank order, once per call, then compute the values that depend on the sums."""
    last = _TVD if call.measure else _KD
    # Each rank has the terms of its own rows only.
    table[_KD : last + 1] = gather_ranks(table[_KD : last + 1], call.group).sum(0)
    table[_KD] = call.spec.from_sums(table[_KD], table[-1])
    table[_FORWARD_KL].clamp_(min=0.0)
    table[_CE:_AGREEMENT] *= stream.is_token(call.labels, call.shard)
