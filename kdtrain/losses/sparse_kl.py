"""Distillation from a sparse record of the teacher: K ids with weights per token, and optionally the mass of the rest.

Streamed over token chunks and vocabulary shards like `dense_kl`, with one slab and one all-gather per chunk. The
student's probability outside the ids is one bucket, summed over the other logits and never computed as 1 minus the ids'
sum. Derivation: docs/design/0007-sparse-loss.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.divergences import DivergenceSpec
from kdtrain_kernels.matmul import work_dtype
from kdtrain_kernels.sparse_dispatch import sparse_kernels
from kdtrain_kernels.sparse_table import SparseRows, merge_sparse_stats, sparse_gradient, sparse_terms
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdtrain.distributed.collectives import Group, start_gather
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import checks, matrix, stream
from kdtrain.losses.arguments import spec_of
from kdtrain.losses.sparse_targets import check_target_contents, check_target_shapes, target_kind
from kdtrain.losses.types import LossParts, SparseTarget


def linear_sparse_kd_loss(
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
    head_s = stream.as_head(head_s)
    checks.check_shard(shard, group)
    kind = target_kind(target, renormalise_student)
    spec = spec_of(divergence, temperature, {"teacher_share": teacher_share, "skew": skew})
    for name in (spec.name, spec.kernel):  # a parameter at an end of its range turns some divergences into a plain KL
        matrix.require(name, kind, allow_biased=allow_biased)
    weights = {"kd_weight": kd_weight, "ce_weight": ce_weight}
    weights = weights if z_weight is None else weights | {"z_weight": z_weight}
    kernels = _checked(hidden_s, head_s, target, labels, weights, shard, backend)
    checks.check_slab_bytes(slab_bytes, shard, group, work_dtype(hidden_s))
    checks.check_main_grad(main_grad, head_s.weight, work_dtype(hidden_s))
    call = _Call(
        head=head_s,
        target=target,
        kind=kind,
        labels=labels,
        weights=stream.TokenWeights.of(kd_weight, ce_weight, z_weight, stream.local_labels(labels, shard)),
        spec=spec,
        shard=shard,
        group=group,
        slab_bytes=slab_bytes,
        main_grad=main_grad,
        needs_grad=stream.NeedsGrad.of(hidden_s, head_s),
        kernels=kernels,
    )
    with torch.autocast(hidden_s.device.type, enabled=False):
        loss, kd, ce, lse = _LinearSparseKd.apply(hidden_s, head_s.weight, head_s.bias, call)
    return LossParts(loss=loss, ce=ce, lse=lse, kd=kd)


def _checked(
    hidden: Tensor,
    head: HeadShard,
    target: SparseTarget,
    labels: Tensor,
    weights: dict[str, Tensor],
    shard: VocabShard,
    backend: str,
) -> ModuleType:
    """Check shapes and contents of the arguments; returns the row kernels to use."""
    checks.check_model("_s", hidden, head, shard)
    checks.check_labels_and_weights(labels, weights, hidden)
    check_target_shapes(target, hidden)
    kernels = sparse_kernels(backend, hidden.device, work_dtype(hidden))
    checks.check_label_range(labels, weights["ce_weight"], shard)
    check_target_contents(target, weights["kd_weight"], shard.vocab_size)
    return kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    head: HeadShard
    target: SparseTarget
    kind: str
    labels: Tensor
    weights: stream.TokenWeights
    spec: DivergenceSpec
    shard: VocabShard
    group: Group
    slab_bytes: int
    main_grad: Tensor | None
    needs_grad: stream.NeedsGrad
    kernels: ModuleType

    def columns(self, chunk: slice) -> Tensor:
        """[C, K] int64 columns of a chunk's ids on this rank, -1 where elsewhere."""
        return stream.local_labels(self.target.ids[chunk], self.shard)

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
"""A chunk's logits without its ids, the ids' columns, and a function that waits for the statistics of all ranks."""


class _LinearSparseKd(torch.autograd.Function):
    """Computes gradients in forward, so that only d(hidden) and d(head) are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        work, temperature = work_dtype(hidden), call.spec.temperature
        rows = stream.chunk_rows(call.slab_bytes, call.shard, call.group, work)
        depth = stream.in_flight(call.group)
        side = stream.ModelSide.of(hidden, call.head, call.shard, rows, depth, work)
        scratch = Scratch.of(side.slabs[0])
        grads = stream.GradientBuffers.zeros(hidden, call.head, call.needs_grad, work, call.main_grad)
        kd, ce, lse = table = torch.zeros(3, hidden.shape[0], dtype=torch.float64, device=hidden.device)

        def issue(chunk: slice, slot: int) -> PendingChunk:
            logits, columns = side.logits(chunk, slot), call.columns(chunk)
            stats = call.kernels.sparse_stats(logits, columns, call.weights.columns[chunk], temperature, scratch)
            # The softmax needs the maxima and sums of all ranks' rows.
            return logits, columns, start_gather(stats, call.group)

        def complete(chunk: slice, pending: PendingChunk) -> None:
            logits, columns, gathered = pending
            totals = merge_sparse_stats(gathered(), temperature)
            terms = sparse_terms(totals, call.teacher(chunk), call.spec)
            kd[chunk], lse[chunk] = terms.value, totals.lse()
            ce[chunk] = lse[chunk] - totals.tail.label
            if call.needs_grad.any:
                weights = call.weights.of_chunk(chunk, lse[chunk])
                gradient = sparse_gradient(totals, terms, weights, columns, temperature, logit_map=side.logit_map)
                operand = call.kernels.sparse_grad(
                    logits,
                    columns,
                    weights.labels,
                    gradient,
                    temperature,
                    logit_map=side.logit_map,
                    scratch=scratch,
                    operand_dtype=side.operand_dtype,
                )
                grads.add(side, chunk, operand)

        stream.run_pipelined(hidden.shape[0], rows, depth, issue, complete)
        table[1] = ce.where(stream.is_token(call.labels, call.shard), 0.0)
        loss = call.weights.loss(table[2], table[1], temperature**2 * table[0]).to(work)
        stream.save_gradients(ctx, grads, (hidden, weight, bias), call.group, call.main_grad)
        kd, ce, lse = table.to(work).unbind(0)
        ctx.mark_non_differentiable(kd, ce, lse)
        return loss, kd, ce, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*stream.scaled_gradients(ctx, grad_loss), None)
