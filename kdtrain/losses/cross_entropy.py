"""Cross-entropy from hidden states, streamed over token chunks and vocabulary shards."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.dispatch import row_kernels
from kdtrain_kernels.matmul import work_dtype
from kdtrain_kernels.torch_rows import RowWeights
from torch import Tensor

from kdtrain.dist.collectives import Group, gather_ranks
from kdtrain.dist.vocab import HeadShard, VocabShard
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
    backend: str = "auto",
) -> LossParts:
    """sum_t weight[t] * -log q(labels[t]), with q = softmax of the head's logits over the whole vocabulary.

    hidden [T, D], replicated over `group`; head [v, D] (or a HeadShard with bias, scale, soft-cap), this rank's rows;
    labels [T], global ids, any value where weight is 0; weight [T], constants. Returns LossParts with `loss` (float32,
    float64 for float64 inputs) and `ce` [T], nats (0 where the label is not a token), both replicated.

    Memory beyond inputs and returned gradients: slab_bytes (half of it on the CPU, where no second slab is needed)
    and a few cache blocks. Gradients are computed here, so backward only scales them: d(hidden) [T, D] complete on
    every rank, d(head) of this rank's rows, 0 in padding rows; with no_grad none of that work is done.
    Communicates over `group`: one all-gather of [C, 4] per chunk and, if hidden needs a gradient, one all-reduce of
    [T, D]; nothing in backward. Raises ValueError for arguments that do not fit; nothing is computed then.
    """
    head = stream.as_head(head)
    checks.check_model("", hidden, head, shard)
    checks.check_labels_and_weights(labels, {"weight": weight}, hidden)
    checks.check_slab_bytes(slab_bytes, shard, work_dtype(hidden))
    kernels = row_kernels(backend, hidden.device)
    checks.check_label_range(labels, weight, shard)
    wanted = stream.Wanted.of(hidden, head)
    call = _Call(head, labels, weight.detach(), shard, group, slab_bytes, wanted, kernels)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, ce = _LinearCrossEntropy.apply(hidden, head.weight, head.bias, call)
    return LossParts(loss=loss, ce=ce)


@dataclass(frozen=True, slots=True)
class _Call:
    head: HeadShard
    labels: Tensor
    weight: Tensor
    shard: VocabShard
    group: Group
    slab_bytes: int
    wanted: stream.Wanted
    kernels: ModuleType


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradient in forward: backward holds d(hidden) and d(head) only."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        work, kernels = work_dtype(hidden), call.kernels
        rows = stream.chunk_rows(call.slab_bytes, call.shard.rows, work)
        side = stream.ModelSide.of(hidden, call.head, call.shard, rows, work)
        scratch = Scratch.of(side.slab)
        grads = stream.GradientBuffers.zeros(hidden, call.head, call.wanted, work)
        columns = stream.local_labels(call.labels, call.shard)
        token_weight = call.weight.double()
        ce = torch.zeros(hidden.shape[0], dtype=torch.float64, device=hidden.device)
        for chunk in stream.chunks(hidden.shape[0], rows):
            logits = side.logits(chunk)
            stats = kernels.row_stats(logits, columns[chunk], 1.0, scratch)
            totals = kernels.merge_stats(gather_ranks(stats, call.group), 1.0)
            ce[chunk] = totals.label_nll()
            if call.wanted.any:
                weights = RowWeights(token_weight[chunk], token_weight[chunk], columns[chunk])
                kernels.row_grad(logits, totals, weights, logit_map=side.logit_map, scratch=scratch)
                grads.add(side, chunk, logits, None)
        ce = ce.where(stream.is_token(call.labels, call.shard), 0.0)
        loss = (token_weight * ce).sum().to(work)
        stream.save_gradients(ctx, grads, (hidden, weight, bias), call.group)
        ce = ce.to(work)
        ctx.mark_non_differentiable(ce)
        return loss, ce

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_ce: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*stream.scaled_gradients(ctx, grad_loss), None)
