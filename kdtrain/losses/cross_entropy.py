"""Cross-entropy from hidden states, streamed over token chunks and vocabulary shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kdtrain_kernels.matmul import work_dtype
from kdtrain_kernels.torch_rows import merge_stats, row_grad_, row_stats
from torch import Tensor

from kdtrain.dist.collectives import Group, gather_ranks
from kdtrain.dist.vocab import HeadShard, VocabShard
from kdtrain.losses import stream
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
) -> LossParts:
    """sum_t weight[t] * -log q(labels[t]), with q = softmax of the head's logits over the whole vocabulary.

    hidden [T, D], replicated over `group`; head [v, D] (or a HeadShard with bias, scale, soft-cap), this rank's rows;
    labels [T] int64, global ids, any value where weight is 0; weight [T]. Returns LossParts with `loss` (float32,
    float64 for float64 inputs) and `ce` [T] (0 where the label is not a token), both replicated.

    Memory beyond inputs and returned gradients: slab_bytes and a few cache blocks. Gradients are computed here, so
    backward only scales them: d(hidden) [T, D] complete on every rank, d(head) [v, D] of this rank's rows.
    Communicates over `group`: one all-gather of [C, 4] per chunk and, if hidden needs a gradient, one all-reduce of
    [T, D]; nothing in backward. Raises ValueError for arguments that do not fit; nothing is computed then.
    """
    head = stream.as_head(head)
    stream.check_model("s", hidden, head, shard)
    stream.check_tokens("labels", labels, hidden, integral=True)
    stream.check_tokens("weight", weight, hidden)
    stream.check_slab_bytes(slab_bytes)
    stream.check_labels(labels, weight, shard)
    call = _Call(head, labels, weight, shard, group, slab_bytes, stream.wanted_gradients(hidden, head))
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
    wanted: tuple[bool, bool, bool]


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradient in forward: backward holds d(hidden) and d(head) only."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        work = work_dtype(hidden)
        rows = stream.chunk_rows(call.slab_bytes, call.shard.rows, work.itemsize)
        side = stream.ModelSide.of(hidden, call.head, call.shard, rows, work)
        grads = stream.GradientBuffers.zeros(hidden, call.head, call.wanted, work)
        columns = stream.local_labels(call.labels, call.shard)
        token_weight = call.weight.to(work)
        ce = torch.zeros(hidden.shape[0], dtype=work, device=hidden.device)
        for chunk in stream.chunks(hidden.shape[0], rows):
            logits = side.logits(chunk)
            totals = merge_stats(gather_ranks(row_stats(logits, columns[chunk]), call.group), 1.0)
            ce[chunk] = totals.lse_1 - totals.label
            if grads.wanted:
                ratio = stream.squared_ratio_of(logits, call.head.softcap)
                grads.add(side, chunk, row_grad_(logits, totals.lse_1, token_weight[chunk], columns[chunk]), ratio)
        ce = ce.where(stream.is_token(call.labels, call.shard), 0.0)
        loss = (token_weight.double() * ce.double()).sum().to(work)
        stream.save_gradients(ctx, grads, hidden, weight, call.group)
        ctx.mark_non_differentiable(ce)
        return loss, ce

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_ce: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*stream.scaled_gradients(ctx, grad_loss), None)
