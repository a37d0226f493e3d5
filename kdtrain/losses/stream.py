"""Shared by the streamed losses: chunking, slabs and gradient buffers.

Shapes: T tokens, C tokens of a chunk, D width, v rows of the head on this rank, n <= v of them real tokens (not
padding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from kdtrain_kernels.matmul import add_weight_grad_, hidden_grad_into, logits_into, operand_dtype
from kdtrain_kernels.torch_rows import LogitMap, RowWeights
from torch import Tensor

from kdtrain.distributed.collectives import Group, reduce_sum_
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses.buffers import fresh
from kdtrain.losses.vocab_group import VocabGroup

SLABS = 2
"""Number of slabs that share `slab_bytes`: student's and teacher's logits.

Cross-entropy alone uses the same chunks, so that a run with kd_weight 0 multiplies the same blocks and gives the same
bits.
"""

DEFAULT_SLAB_BYTES = 1 << 30

ROW_MULTIPLE = 128
"""The row stride of a slab is a multiple of this many elements, so that row kernels load 16 bytes at a time."""

PendingChunk = TypeVar("PendingChunk")


def in_flight(vocab: VocabGroup) -> int:
    """Chunks in flight: two if there are several ranks, so that the exchange of one overlaps with the other's
    computation."""
    return 2 if vocab.size > 1 else 1


def bytes_per_token(vocab: VocabGroup, work: torch.dtype) -> int:
    """Slab bytes that one token per chunk takes on this rank, over all chunks in flight."""
    return SLABS * in_flight(vocab) * row_stride(vocab.shard) * work.itemsize


def row_stride(shard: VocabShard) -> int:
    """Elements from one row of a slab to the next."""
    return -(-shard.rows // ROW_MULTIPLE) * ROW_MULTIPLE


def chunk_rows(slab_bytes: int, vocab: VocabGroup, work: torch.dtype) -> int:
    """Tokens of a chunk: as many as fit in slab_bytes, a multiple of 8 if 8 fit.

    It does not depend on T, so that a token's arithmetic does not depend on its batch, or on this rank's real tokens,
    so that all ranks take part in the same collectives.
    """
    fitting = slab_bytes // bytes_per_token(vocab, work)
    return fitting - fitting % 8 if fitting >= 8 else fitting


def run_pipelined(
    num_tokens: int,
    rows: int,
    depth: int,
    issue: Callable[[slice, int], PendingChunk],
    complete: Callable[[slice, PendingChunk], None],
) -> None:
    """Call issue(chunk, slot), then complete(chunk, its result), for consecutive chunks of at most `rows` tokens.

    Up to `depth` chunks are pending at a time; `slot` is in [0, depth) and is reused only after its chunk is complete.
    The order is the same on all ranks, so collectives that `issue` starts match.
    """
    pending: list[tuple[slice, PendingChunk]] = []
    for index, first in enumerate(range(0, num_tokens, rows)):
        chunk = slice(first, min(first + rows, num_tokens))
        if len(pending) == depth:
            complete(*pending.pop(0))
        pending.append((chunk, issue(chunk, index % depth)))
    for entry in pending:
        complete(*entry)


def as_head(head: Tensor | HeadShard) -> HeadShard:
    """Wrap a bare weight as a head without bias, scale or cap."""
    return head if isinstance(head, HeadShard) else HeadShard(head)


def local_labels(labels: Tensor, shard: VocabShard) -> Tensor:
    """[T] int64 column of each label among this rank's real tokens, -1 where it is elsewhere or not a token."""
    column = labels.long() - shard.start
    return column.where((column >= 0) & (column < shard.valid_rows), -1)


def is_token(labels: Tensor, shard: VocabShard) -> Tensor:
    """[T] bool: whether the label is a real token, on any rank."""
    return (labels >= 0) & (labels < shard.vocab_size)


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """Constants per token. kd, ce [T] float64, z [T] float64 or None; columns [T] int64 as `local_labels` has them."""

    kd: Tensor
    ce: Tensor
    z: Tensor | None
    columns: Tensor

    @classmethod
    def of(cls, kd: Tensor, ce: Tensor, z: Tensor | None, columns: Tensor) -> TokenWeights:
        """From the caller's weights, in any floating-point dtype."""
        return cls(kd.detach().double(), ce.detach().double(), None if z is None else z.detach().double(), columns)

    def of_chunk(self, chunk: slice, lse: Tensor) -> RowWeights:
        """What row kernels need for a chunk. lse [C] float64: log sum exp of the student's logits."""
        ce = self.ce[chunk]
        softmax = ce if self.z is None else ce + 2.0 * self.z[chunk] * lse
        return RowWeights(self.kd[chunk], ce, self.columns[chunk], softmax)

    def loss(self, lse: Tensor, ce: Tensor, kd: Tensor | None = None) -> Tensor:
        """sum_t ce-weight * ce + kd-weight * kd + z-weight * lse^2, 0-d float64. Arguments [T] float64.

        A position of weight 0 contributes exactly 0, even if its value is not finite.
        """
        terms = [(self.ce, ce)]
        if kd is not None:
            terms.append((self.kd, kd))
        if self.z is not None:
            terms.append((self.z, lse.square()))
        return torch.stack([(weight * value).where(weight != 0, 0.0).sum() for weight, value in terms]).sum()


@dataclass(frozen=True, slots=True)
class ModelSide:
    """One model's operands, real tokens only: hidden [T, D], weight [n, D], bias [n]; slabs for chunks of its logits.

    slabs [depth, C, n], rows apart by `row_stride`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_map: LogitMap
    slabs: Tensor

    @classmethod
    def of(
        cls, hidden: Tensor, head: HeadShard, shard: VocabShard, rows: int, depth: int, work: torch.dtype
    ) -> ModelSide:
        """Slice off padding rows (they never take part) and allocate slabs for `depth` chunks of `rows` tokens."""
        n, num_tokens = shard.valid_rows, hidden.shape[0]
        depth = max(1, min(depth, -(-num_tokens // rows)))
        memory = fresh(depth, min(rows, num_tokens), row_stride(shard), dtype=work, device=hidden.device)
        bias = None if head.bias is None else head.bias.detach()[:n].to(work)
        logit_map = LogitMap(head.logit_scale, head.softcap)
        return cls(hidden.detach(), head.weight.detach()[:n], bias, logit_map, memory[:, :, :n])

    @property
    def operand_dtype(self) -> torch.dtype:
        """The dtype in which d(logits) is multiplied with the head and the hidden states."""
        return operand_dtype(self.weight, self.slabs.dtype)

    def logits(self, chunk: slice, slot: int) -> Tensor:
        """[C, n] logits of a chunk, in the slab of `slot`; overwrites the logits of the slot's previous chunk."""
        hidden = self.hidden[chunk]
        out = logits_into(self.slabs[slot, : hidden.shape[0]], hidden, self.weight)
        if self.bias is not None:
            out.add_(self.bias)
        return self.logit_map.apply_(out)


@dataclass(frozen=True, slots=True)
class NeedsGrad:
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, hidden: Tensor, head: HeadShard) -> NeedsGrad:
        """From requires_grad; all False under no_grad. Must be called outside of an autograd.Function."""
        if not torch.is_grad_enabled():
            return cls(False, False, False)
        return cls(hidden.requires_grad, head.weight.requires_grad, head.bias is not None and head.bias.requires_grad)

    @property
    def any(self) -> bool:
        """Whether any gradient is needed."""
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True, slots=True)
class GradientBuffers:
    """Accumulated gradients in the working dtype; padding rows stay 0.

    hidden [T, D] (this rank's part), weight [v, D], bias [v]; None where not needed.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(
        cls, hidden: Tensor, head: HeadShard, needs_grad: NeedsGrad, work: torch.dtype, main_grad: Tensor | None = None
    ) -> GradientBuffers:
        """Buffers for the gradients that are needed. The weight's gradient is added to main_grad [v, D] if given."""

        def zeros(like: Tensor | None, is_needed: bool) -> Tensor | None:
            if like is None or not is_needed:
                return None
            return fresh(*like.shape, dtype=work, device=like.device).zero_()

        return cls(
            zeros(hidden.detach(), needs_grad.hidden),
            zeros(head.weight.detach(), needs_grad.weight) if main_grad is None else main_grad,
            zeros(None if head.bias is None else head.bias.detach(), needs_grad.bias),
        )

    def add(self, side: ModelSide, chunk: slice, grad_logits: Tensor) -> None:
        """Accumulate a chunk's d loss / d product [C, n], given in side.operand_dtype."""
        n = grad_logits.shape[1]
        if n == 0:
            return
        if self.bias is not None:
            self.bias[:n] += grad_logits.sum(0, dtype=self.bias.dtype)
        if self.hidden is not None:
            hidden_grad_into(self.hidden[chunk], grad_logits, side.weight)
        if self.weight is not None:
            add_weight_grad_(self.weight[:n], grad_logits, side.hidden[chunk])


def save_gradients(
    ctx: Any,
    grads: GradientBuffers,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    group: Group,
    main_grad: Tensor | None = None,
) -> None:
    """Complete d(hidden) over the group and keep all gradients for backward, which rounds them to `inputs`' dtypes.

    Communicates: one all-reduce of [T, D] if d(hidden) is wanted. With main_grad the weight's gradient is in place
    already.
    """
    if grads.hidden is not None:
        # Each rank has d(hidden) through its own rows of the head only.
        reduce_sum_(grads.hidden, group)
    ctx.fused, ctx.spent, ctx.handed_over = main_grad is not None, False, False
    ctx.dtypes = [None if like is None else like.dtype for like in inputs]
    ctx.save_for_backward(grads.hidden, None if ctx.fused else grads.weight, grads.bias)


def scaled_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """The kept gradients times the upstream scalar. Does not communicate: the upstream scalar is replicated.

    On a CPU the first backward with a scalar of 1 hands over the kept tensors themselves, where their dtype is right:
    a second backward returns copies, and fails if the first gradient was changed in place (autograd's RuntimeError).
    Raises ValueError if main_grad was used and this is not the first backward, or (on a device: fails an assertion
    there) the upstream scalar is not 1.
    """
    if ctx.fused:
        if ctx.spent:
            raise ValueError("backward was called twice on a loss with main_grad, which adds the gradient only once")
        ctx.spent = True
        if grad_loss.device.type != "cpu":
            torch._assert_async(grad_loss == 1)
        elif grad_loss.item() != 1:
            raise ValueError(
                f"the loss was scaled by {grad_loss.item():g} before backward, need 1 with main_grad: its gradient was "
                "added in forward; put the factor into kd_weight and ce_weight"
            )
    hand_over = grad_loss.device.type == "cpu" and not ctx.handed_over and grad_loss.item() == 1
    ctx.handed_over = True
    gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return tuple(g if hand_over and g is not None and g.dtype == t else _times(g, grad_loss, t) for g, t in gradients)


def _times(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient * factor, multiplied in the gradient's dtype and then rounded, because factors like 1 / N are inexact in
    low precision."""
    if gradient is None:
        return None
    return torch.mul(gradient, factor.to(gradient.dtype), out=torch.empty_like(gradient, dtype=dtype))
