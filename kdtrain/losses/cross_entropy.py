"""Cross-entropy from hidden states, streamed over token chunks and vocabulary shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.dispatch import row_kernels
from kdtrain_kernels.matmul import work_dtype
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdtrain.distributed.collectives import Group, start_gather
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import checks, stream
from kdtrain.losses.types import LossParts


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor | HeadShard,
    labels: Tensor,
    *,
    weight: Tensor,
    shard: VocabShard,
    group: Group = None,
    slab_bytes: int = stream.DEFAULT_SLAB_BYTES,
    z_weight: Tensor | None = None,
    main_grad: Tensor | None = None,
    backend: str = "auto",
) -> LossParts:
    """sum_t weight[t] * -log q(labels[t]), with q = softmax of the head's logits over the whole vocabulary.

    hidden [T, D], replicated over `group`; head [v, D] (or a HeadShard with bias, scale, soft-cap), this rank's rows;
    labels [T], global ids, any value where weight is 0; weight [T], constants. Returns LossParts with `loss` (float32,
    float64 for float64 inputs) and `ce` [T], nats (0 where the label is not a token), both replicated.
    z_weight [T] adds sum_t z_weight[t] lse[t]^2, with lse = log sum exp of the logits (z-loss, PaLM, arXiv 2204.02311).
    main_grad [v, D] in the working dtype receives d(head) on top of what it holds, in forward, and the weight gets no
    .grad: backward must then be called once, with an upstream gradient of 1 (ValueError otherwise). Do not recompute
    this call (activation checkpointing around it) or discard its loss: each forward adds to the buffer. shard, group,
    slab_bytes (of which one model uses half) and backend: as in `linear_kd_loss`.

    Memory beyond inputs and gradients: half of slab_bytes (chunks are those of `linear_kd_loss`, with one model) and a
    few cache blocks. Gradients accumulate in float32 (float64) and are kept so until backward, which scales and rounds
    them into new tensors: d(hidden) complete on every rank, d(head) of this rank's rows, 0 in padding rows. Under
    no_grad no gradient is computed. Communicates over `group`: one all-gather of [C, 4] per chunk, hidden behind the
    next chunk, and, if hidden needs a gradient, one all-reduce of [T, D]; nothing in backward. Raises ValueError for
    inconsistent arguments before anything is computed.
    """
    head = stream.as_head(head)
    checks.check_shard(shard, group)
    checks.check_model("", hidden, head, shard)
    weights = {"weight": weight} if z_weight is None else {"weight": weight, "z_weight": z_weight}
    checks.check_labels_and_weights(labels, weights, hidden)
    checks.check_slab_bytes(slab_bytes, shard, group, work_dtype(hidden))
    checks.check_main_grad(main_grad, head.weight, work_dtype(hidden))
    kernels = row_kernels(backend, hidden.device, work_dtype(hidden))
    checks.check_label_range(labels, weight, shard)
    needs_grad = stream.NeedsGrad.of(hidden, head)
    tokens = stream.TokenWeights.of(weight, weight, z_weight, stream.local_labels(labels, shard))
    call = _Call(head, labels, tokens, shard, group, slab_bytes, main_grad, needs_grad, kernels)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, ce, lse = _LinearCrossEntropy.apply(hidden, head.weight, head.bias, call)
    return LossParts(loss=loss, ce=ce, lse=lse)


@dataclass(frozen=True, slots=True)
class _Call:
    head: HeadShard
    labels: Tensor
    weights: stream.TokenWeights
    shard: VocabShard
    group: Group
    slab_bytes: int
    main_grad: Tensor | None
    needs_grad: stream.NeedsGrad
    kernels: ModuleType


PendingChunk = tuple[Tensor, Callable[[], Tensor]]
"""A chunk's logits, and a function that waits for the statistics of all ranks."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes gradients in forward, so that only d(hidden) and d(head) are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        work, kernels = work_dtype(hidden), call.kernels
        rows = stream.chunk_rows(call.slab_bytes, call.shard, call.group, work)
        depth = stream.in_flight(call.group)
        side = stream.ModelSide.of(hidden, call.head, call.shard, rows, depth, work)
        scratch = Scratch.of(side.slabs[0])
        grads = stream.GradientBuffers.zeros(hidden, call.head, call.needs_grad, work, call.main_grad)
        ce, lse = torch.zeros(2, hidden.shape[0], dtype=torch.float64, device=hidden.device)

        def issue(chunk: slice, slot: int) -> PendingChunk:
            logits = side.logits(chunk, slot)
            stats = kernels.row_stats(logits, call.weights.columns[chunk], 1.0, scratch)
            # The softmax needs the maxima and sums of all ranks' rows.
            return logits, start_gather(stats, call.group)

        def complete(chunk: slice, pending: PendingChunk) -> None:
            logits, gathered = pending
            totals = kernels.merge_stats(gathered(), 1.0)
            ce[chunk], lse[chunk] = totals.label_nll(), totals.lse()
            if call.needs_grad.any:
                weights = call.weights.of_chunk(chunk, lse[chunk])
                operand = kernels.row_grad(
                    logits, totals, weights, logit_map=side.logit_map, scratch=scratch, operand_dtype=side.operand_dtype
                )
                grads.add(side, chunk, operand)

        stream.run_pipelined(hidden.shape[0], rows, depth, issue, complete)
        ce = ce.where(stream.is_token(call.labels, call.shard), 0.0)
        loss = call.weights.loss(lse, ce).to(work)
        stream.save_gradients(ctx, grads, (hidden, weight, bias), call.group, call.main_grad)
        ce, lse = ce.to(work), lse.to(work)
        ctx.mark_non_differentiable(ce, lse)
        return loss, ce, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*stream.scaled_gradients(ctx, grad_loss), None)
