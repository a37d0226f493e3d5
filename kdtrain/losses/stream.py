"""What the streamed losses share: chunking, slabs and gradient buffers.

Shapes: T tokens, C tokens of a chunk, D width, v rows of the head on this rank, n <= v real tokens among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from kdtrain_kernels.matmul import add_weight_grad_, gradient_operand, hidden_grad_into, logits_into
from kdtrain_kernels.torch_rows import LogitMap
from torch import Tensor

from kdtrain.dist.collectives import Group, reduce_sum_
from kdtrain.dist.vocab import HeadShard, VocabShard

SLABS = 2
"""Slabs that share `slab_bytes`: student's and teacher's logits. Cross-entropy alone chunks alike, so that a run with
kd_weight 0 multiplies the same blocks and is bitwise the plain one."""

DEFAULT_SLAB_BYTES = 1 << 30


def bytes_per_token(rows: int, work: torch.dtype) -> int:
    """Slab bytes that one token of a chunk takes on a rank with `rows` head rows."""
    return SLABS * rows * work.itemsize


def chunk_rows(slab_bytes: int, rows: int, work: torch.dtype) -> int:
    """Tokens of a chunk: as many as fit in slab_bytes, a multiple of 8 if 8 fit.

    Depends on nothing else: not on T, so that a token's arithmetic does not depend on the batch it came in; and not
    on this rank's real tokens, so that all ranks take part in the same collectives.
    """
    fitting = slab_bytes // bytes_per_token(rows, work)
    return fitting - fitting % 8 if fitting >= 8 else fitting


def chunks(num_tokens: int, rows: int) -> Iterator[slice]:
    """Consecutive slices of at most `rows` tokens."""
    for first in range(0, num_tokens, rows):
        yield slice(first, min(first + rows, num_tokens))


def as_head(head: Tensor | HeadShard) -> HeadShard:
    """A bare weight is a head without bias, scale or cap."""
    return head if isinstance(head, HeadShard) else HeadShard(head)


def local_labels(labels: Tensor, shard: VocabShard) -> Tensor:
    """[T] int64 column of each label among this rank's real tokens, -1 where it is elsewhere or not a token."""
    column = labels.long() - shard.start
    return column.where((column >= 0) & (column < shard.valid_rows), -1)


def is_token(labels: Tensor, shard: VocabShard) -> Tensor:
    """[T] bool: whether the label is a real token, on any rank."""
    return (labels >= 0) & (labels < shard.vocab_size)


@dataclass(frozen=True, slots=True)
class ModelSide:
    """One model's operands, real tokens only: hidden [T, D], weight [n, D], bias [n], and the slab for its logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_map: LogitMap
    slab: Tensor

    @classmethod
    def of(cls, hidden: Tensor, head: HeadShard, shard: VocabShard, rows: int, work: torch.dtype) -> ModelSide:
        """Slice off padding rows (they never take part) and allocate the slab for chunks of `rows` tokens."""
        n = shard.valid_rows
        slab = torch.empty(min(rows, hidden.shape[0]), n, dtype=work, device=hidden.device)
        bias = None if head.bias is None else head.bias.detach()[:n].to(work)
        logit_map = LogitMap(head.logit_scale, head.softcap)
        return cls(hidden.detach(), head.weight.detach()[:n], bias, logit_map, slab)

    def logits(self, rows: slice) -> Tensor:
        """[C, n] logits of a chunk, in the slab: the previous chunk's are gone."""
        hidden = self.hidden[rows]
        out = logits_into(self.slab[: hidden.shape[0]], hidden, self.weight)
        if self.bias is not None:
            out.add_(self.bias)
        return self.logit_map.apply_(out)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, hidden: Tensor, head: HeadShard) -> Wanted:
        """What autograd will ask for; nothing under no_grad. Ask before entering an autograd.Function."""
        if not torch.is_grad_enabled():
            return cls(False, False, False)
        return cls(hidden.requires_grad, head.weight.requires_grad, head.bias is not None and head.bias.requires_grad)

    @property
    def any(self) -> bool:
        """Whether any gradient is wanted at all."""
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True, slots=True)
class GradientBuffers:
    """Accumulated gradients in the working dtype; padding rows stay 0.

    hidden [T, D] (this rank's part), weight [v, D], bias [v]; None where not wanted.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, hidden: Tensor, head: HeadShard, wanted: Wanted, work: torch.dtype) -> GradientBuffers:
        """Buffers for what is wanted."""

        def zeros(like: Tensor | None, is_wanted: bool) -> Tensor | None:
            return torch.zeros_like(like, dtype=work) if is_wanted and like is not None else None

        return cls(
            zeros(hidden.detach(), wanted.hidden),
            zeros(head.weight.detach(), wanted.weight),
            zeros(None if head.bias is None else head.bias.detach(), wanted.bias),
        )

    def add(self, side: ModelSide, rows: slice, grad_logits: Tensor, spare: Tensor | None) -> None:
        """Take in a chunk's d loss / d product [C, n]. `spare`: a slab whose contents are no longer needed."""
        n = grad_logits.shape[1]
        if n == 0:
            return
        if self.bias is not None:
            self.bias[:n] += grad_logits.sum(0)
        operand = gradient_operand(grad_logits, side.weight, spare)
        if self.hidden is not None:
            hidden_grad_into(self.hidden[rows], operand, side.weight)
        if self.weight is not None:
            add_weight_grad_(self.weight[:n], operand, side.hidden[rows])


def save_gradients(
    ctx: Any, grads: GradientBuffers, inputs: tuple[Tensor, Tensor, Tensor | None], group: Group
) -> None:
    """Complete d(hidden) over the group and keep all gradients for backward, in the dtypes of `inputs`.

    Communicates: one all-reduce of [T, D] if d(hidden) is wanted.
    """
    if grads.hidden is not None:
        reduce_sum_(grads.hidden, group)
    kept = []
    for gradient, like in zip((grads.hidden, grads.weight, grads.bias), inputs, strict=True):
        kept.append(None if gradient is None or like is None else gradient.to(like.dtype))
    ctx.save_for_backward(*kept)


def scaled_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """The kept gradients times the upstream scalar. Does not communicate: the upstream scalar is replicated."""
    return tuple(None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors)
