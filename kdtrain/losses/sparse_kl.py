"""Distillation from a sparse record of the teacher: K ids with weights per token, and optionally the mass of the rest.

Streamed over token chunks and vocabulary shards like `dense_kl`, with one slab and one all-gather per chunk. The
student's probability outside the ids is one bucket, summed over the other logits and never computed as 1 minus the ids'
sum. Derivation: docs/design/0007-sparse-loss.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from kdtrain_kernels.divergences import DivergenceSpec
from kdtrain_kernels.matmul import work_dtype
from kdtrain_kernels.protocol import SparseKernels
from kdtrain_kernels.sparse_dispatch import sparse_kernels
from kdtrain_kernels.sparse_table import SparseRows, merge_sparse_stats, sparse_gradient, sparse_terms
from torch import Tensor

from kdtrain.distributed.collectives import Group, start_gather
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import checks, matrix, stream
from kdtrain.losses.arguments import spec_of
from kdtrain.losses.runner import Call, Run, streamed
from kdtrain.losses.sparse_targets import check_target_contents, check_target_shapes, target_kind
from kdtrain.losses.types import LossParts, SparseTarget
from kdtrain.losses.vocab_group import VocabGroup


def linear_sparse_kd_loss(  # noqa: PLR0913
    hidden_s: Tensor,
    head_s: Tensor | HeadShard,
    target: SparseTarget,
    labels: Tensor,
    *,
    divergence: str | DivergenceSpec = "forward_kl",
    temperature: float = 1.0,
    kd_weight: Tensor,
    ce_weight: Tensor,
    shard: VocabShard,
    group: Group = None,
    slab_bytes: int = stream.DEFAULT_SLAB_BYTES,
    teacher_share: float = 0.5,
    skew: float = 0.1,
    allow_biased: bool = False,
    renormalise_student: bool = False,
    z_weight: Tensor | None = None,
    main_grad: Tensor | None = None,
    backend: str = "auto",
) -> LossParts:
    """sum_t kd_weight[t] temperature^2 D[t] + ce_weight[t] CE[t], with D the divergence on the target's ids.

    hidden_s [T, D], target and labels [T], replicated over `group`; head_s [v, D] (or a HeadShard), this rank's rows.
    target: weights at this temperature (a record made at another one is a different distribution, which cannot be
    detected here). With a tail, D is the divergence of both distributions with the ids outside the record merged into
    one. Without a tail, the teacher's probability there is 0. For an unbiased target D is the cross-entropy under the
    weights minus target.entropy, which may be negative for a token. With renormalise_student both models are
    renormalised on the ids and the student's other logits get no gradient from D. `losses.matrix` declares which
    divergence is exact, a bound or biased on which target; biased cells need allow_biased. A token without any weight
    and without a tail has D = 0. All other arguments as in `linear_kd_loss`. Returns LossParts with `kd`; values in
    nats. Derivation: docs/design/0007-sparse-loss.md.

    Where kd_weight is 0 everywhere, loss and gradients are those of `linear_cross_entropy` up to rounding (the ids are
    summed separately from the rest). Memory beyond inputs and gradients: half of slab_bytes (chunks are those of
    `linear_kd_loss`, with one model), a few cache blocks, some [C, K] and, before the first chunk, a sorted copy of the
    ids for the check for duplicates. Gradients are kept and rounded as by `linear_kd_loss`: d(hidden_s) complete on
    every rank, d(head_s) of this rank's rows, 0 in padding rows. Under no_grad no gradient is computed. Communicates
    over `group`: one all-gather of [C, 4 + K] per chunk, hidden behind the next chunk, and, if hidden_s needs a
    gradient, one all-reduce of [T, D]; nothing in backward. Raises ValueError for inconsistent arguments and for cells
    that the matrix refuses, before anything is computed.
    """
    head_s, vocab, work = stream.as_head(head_s), VocabGroup(shard, group), work_dtype(hidden_s)
    kind = target_kind(target, renormalise_student)
    spec = spec_of(divergence, temperature, {"teacher_share": teacher_share, "skew": skew})
    for name in (spec.name, spec.kernel):  # a parameter at an end of its range turns some divergences into a plain KL
        matrix.require(name, kind, allow_biased=allow_biased)
    checks.check_model("_s", hidden_s, head_s, shard)
    check_target_shapes(target, hidden_s)
    kernels = sparse_kernels(backend, hidden_s.device, work)
    weights = {"kd_weight": kd_weight, "ce_weight": ce_weight, "z_weight": z_weight}
    call = Call.checked(hidden_s, head_s, labels, weights, vocab, slab_bytes, main_grad, work)
    check_target_contents(target, kd_weight, shard.vocab_size)
    loss, (kd, ce, lse) = streamed(call, _SparseKd(target, kind, spec, kernels))
    return LossParts(loss=loss, ce=ce, lse=lse, kd=kd)


@dataclass(frozen=True, slots=True)
class _SparseKd:
    target: SparseTarget
    kind: str
    spec: DivergenceSpec
    kernels: SparseKernels

    def begin(self, run: Run) -> _Steps:
        """Without a teacher's side: a record needs no slab."""
        return _Steps(run, self, run.table(3))

    def teacher(self, chunk: slice) -> SparseRows:
        """The teacher's side of a chunk."""
        target, kind = self.target, self.kind
        return SparseRows(
            weights=target.weights[chunk].detach(),
            log_tail=target.log_tail[chunk].detach() if target.log_tail is not None and kind == "top_k_tail" else None,
            entropy=target.entropy[chunk].detach() if (kind, self.spec.kernel) == ("sampled", "forward_kl") else None,
            conditional=kind == "conditional",
        )


PendingChunk = tuple[Tensor, Tensor, Callable[[], Tensor]]
"""A chunk's logits without its ids, the ids' columns [C, K] on this rank (-1 where elsewhere), and a function that
waits for the statistics of all ranks."""


@dataclass(frozen=True, slots=True)
class _Steps:
    """table: kd, ce and lse per token."""

    run: Run
    loss: _SparseKd
    table: Tensor

    def issue(self, chunk: slice, slot: int) -> PendingChunk:
        run, call = self.run, self.run.call
        logits = run.student.logits(chunk, slot)
        columns = stream.local_labels(self.loss.target.ids[chunk], call.vocab.shard)
        stats = self.loss.kernels.sparse_stats(
            logits, columns, call.weights.columns[chunk], self.loss.spec.temperature, run.scratch
        )
        # The softmax needs the maxima and sums of all ranks' rows.
        return logits, columns, start_gather(stats, call.vocab.group)

    def complete(self, chunk: slice, pending: PendingChunk) -> Tensor | None:
        logits, columns, gathered = pending
        run, call, spec = self.run, self.run.call, self.loss.spec
        totals = merge_sparse_stats(gathered(), spec.temperature)
        terms = sparse_terms(totals, self.loss.teacher(chunk), spec)
        kd, ce, lse = self.table[:, chunk]
        kd.copy_(terms.value)
        lse.copy_(totals.lse())
        torch.sub(lse, totals.tail.label, out=ce)
        if not call.needs_grad.any:
            return None
        weights, logit_map = call.weights.of_chunk(chunk, lse), run.student.logit_map
        gradient = sparse_gradient(totals, terms, weights, columns, spec.temperature, logit_map=logit_map)
        return self.loss.kernels.sparse_grad(
            logits,
            columns,
            weights.labels,
            gradient,
            spec.temperature,
            logit_map=logit_map,
            scratch=run.scratch,
            operand_dtype=run.student.operand_dtype,
        )

    def finish(self) -> tuple[Tensor, Tensor]:
        call, (kd, ce, lse) = self.run.call, self.table
        self.table[1] = ce.where(stream.is_token(call.labels, call.vocab.shard), 0.0)
        return call.weights.loss(lse, ce, self.loss.spec.temperature**2 * kd), self.table
