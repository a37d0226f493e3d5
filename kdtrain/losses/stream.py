"""What the streamed losses share: argument checks, chunking, slabs and gradient buffers.

Shapes: T tokens, C tokens of a chunk, D width, v rows of the head on this rank, n <= v real tokens among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from kdtrain_kernels.matmul import add_matmul_, as_operand, matmul_into
from kdtrain_kernels.torch_rows import apply_head_, head_slope_
from torch import Tensor

from kdtrain.dist.collectives import Group, reduce_sum_
from kdtrain.dist.vocab import HeadShard, VocabShard

SLABS = 2
"""Slabs that share `slab_bytes`: student's and teacher's logits. Cross-entropy alone chunks alike, so that a run with
kd_weight 0 multiplies the same blocks and is bitwise the plain one."""

DEFAULT_SLAB_BYTES = 1 << 30


def chunk_rows(slab_bytes: int, rows: int, itemsize: int) -> int:
    """Tokens of a chunk: as many as `SLABS` slabs of `rows` columns fit in slab_bytes; at least 1."""
    fitting = slab_bytes // (SLABS * max(rows, 1) * itemsize)
    return max(1, fitting - fitting % 8 if fitting >= 8 else fitting)


def as_head(head: Tensor | HeadShard) -> HeadShard:
    """A bare weight is a head without bias, scale or cap."""
    return head if isinstance(head, HeadShard) else HeadShard(head)


def check_model(role: str, hidden: Tensor, head: HeadShard, shard: VocabShard) -> None:
    """ValueError unless hidden [T, D] and head.weight [shard.rows, D] fit each other."""
    weight = head.weight
    if hidden.ndim != 2:
        raise ValueError(f"hidden_{role} must be [tokens, width], got shape {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"head_{role} has shape {tuple(weight.shape)}, need [rows, {hidden.shape[1]}] as hidden_{role}")
    if weight.shape[0] != shard.rows:
        raise ValueError(f"head_{role} has {weight.shape[0]} rows, but shard [{shard.start}, {shard.stop}) declares {shard.rows}")
    if head.bias is not None and head.bias.shape != (shard.rows,):
        raise ValueError(f"head_{role}.bias has shape {tuple(head.bias.shape)}, need ({shard.rows},)")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"head_{role}.softcap = {head.softcap} must be > 0 or None")
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"hidden_{role} is {hidden.dtype} on {hidden.device}, head_{role} is {weight.dtype} on {weight.device}: must agree"
        )
    if not hidden.dtype.is_floating_point:
        raise ValueError(f"hidden_{role} has dtype {hidden.dtype}, need a floating-point one")


def check_tokens(name: str, tensor: Tensor, hidden: Tensor, *, integral: bool = False) -> None:
    """ValueError unless `tensor` is [T] on hidden's device, and of an integer type if `integral`."""
    if tensor.shape != hidden.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, need ({hidden.shape[0]},), one per token")
    if tensor.device != hidden.device:
        raise ValueError(f"{name} is on {tensor.device}, hidden states are on {hidden.device}")
    if integral == tensor.dtype.is_floating_point:
        raise ValueError(f"{name} has dtype {tensor.dtype}, need {'an integer' if integral else 'a floating-point'} type")


def check_labels(labels: Tensor, weight: Tensor, shard: VocabShard) -> None:
    """Labels that count must be tokens. ValueError on the CPU; an assertion on the device elsewhere (no stall)."""
    bad = (weight != 0) & ~is_token(labels, shard)
    if labels.device.type != "cpu":
        torch._assert_async(~bad.any())
    elif bool(bad.any()):
        place = int(bad.nonzero()[0])
        raise ValueError(
            f"labels[{place}] = {int(labels[place])} is not in [0, {shard.vocab_size}) though its weight is "
            f"{float(weight[place]):g}; give positions without a label the weight 0"
        )


def check_slab_bytes(slab_bytes: int) -> None:
    """ValueError unless it is a positive number of bytes."""
    if slab_bytes < 1:
        raise ValueError(f"slab_bytes = {slab_bytes} must be at least 1")


def local_labels(labels: Tensor, shard: VocabShard) -> Tensor:
    """Column of each label among this rank's real tokens, -1 where it is elsewhere or not a token."""
    column = labels - shard.start
    return column.where((column >= 0) & (column < shard.valid_rows), -1)


def is_token(labels: Tensor, shard: VocabShard) -> Tensor:
    """[T] bool: whether the label is a real token, on any rank."""
    return (labels >= 0) & (labels < shard.vocab_size)


@dataclass(slots=True)
class ModelSide:
    """One model's operands: hidden [T, D] and weight [n, D] ready for the matrix product, and its logits' slab."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    head: HeadShard
    slab: Tensor

    @classmethod
    def of(cls, hidden: Tensor, head: HeadShard, shard: VocabShard, rows: int, work: torch.dtype) -> ModelSide:
        """Slice off padding rows (they never take part), bring operands to the product's dtype, allocate the slab."""
        n = shard.valid_rows
        slab = torch.empty(min(rows, hidden.shape[0]), n, dtype=work, device=hidden.device)
        bias = None if head.bias is None else head.bias[:n].detach().to(work)
        weight = as_operand(head.weight.detach()[:n], work)
        return cls(as_operand(hidden.detach(), work), weight, bias, head, slab)

    def logits(self, rows: slice) -> Tensor:
        """[C, n] logits of a chunk, in the slab: the previous chunk's are gone."""
        hidden = self.hidden[rows]
        out = matmul_into(self.slab[: hidden.shape[0]], hidden, self.weight.T)
        return apply_head_(out, self.bias, self.head.logit_scale, self.head.softcap)


@dataclass(slots=True)
class GradientBuffers:
    """Accumulated gradients: hidden [T, D] (this rank's part), weight [v, D], bias [v]; padding rows stay 0."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, hidden: Tensor, head: HeadShard, wanted: tuple[bool, bool, bool], work: torch.dtype) -> GradientBuffers:
        """Buffers for what is wanted of (hidden, weight, bias), in the working dtype."""
        options = {"dtype": work, "device": hidden.device}
        return cls(
            torch.zeros(hidden.shape, **options) if wanted[0] else None,
            torch.zeros(head.weight.shape, **options) if wanted[1] else None,
            torch.zeros(head.weight.shape[0], **options) if wanted[2] else None,
        )

    @property
    def wanted(self) -> bool:
        """Whether anything is accumulated at all."""
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(self, side: ModelSide, rows: slice, gradient: Tensor, squared_ratio: Tensor | None) -> None:
        """Take in a chunk's d loss / d logits [C, n], which is spoilt."""
        gradient = head_slope_(gradient, squared_ratio, side.head.logit_scale)
        n = gradient.shape[1]
        if n == 0:
            return
        if self.bias is not None:
            self.bias[:n] += gradient.sum(0)
        operand = gradient.to(side.weight.dtype)
        if self.hidden is not None:
            matmul_into(self.hidden[rows], operand, side.weight)
        if self.weight is not None:
            add_matmul_(self.weight[:n], operand.T, side.hidden[rows])


def squared_ratio_of(logits: Tensor, softcap: float | None) -> Tensor | None:
    """(s / softcap)^2, needed for the chain rule once the logits have been overwritten; None without a cap."""
    return None if softcap is None else (logits / softcap).square_()


def chunks(num_tokens: int, rows: int) -> Iterator[slice]:
    """Consecutive slices of at most `rows` tokens."""
    for first in range(0, num_tokens, rows):
        yield slice(first, min(first + rows, num_tokens))


def wanted_gradients(hidden: Tensor, head: HeadShard) -> tuple[bool, bool, bool]:
    """Which of (hidden, weight, bias) need a gradient; none under no_grad. Ask before entering a Function."""
    if not torch.is_grad_enabled():
        return False, False, False
    return hidden.requires_grad, head.weight.requires_grad, head.bias is not None and head.bias.requires_grad


def save_gradients(ctx: Any, grads: GradientBuffers, hidden: Tensor, weight: Tensor, group: Group) -> None:
    """Complete d(hidden) over the group and keep all gradients for backward, in their tensors' dtypes.

    Communicates: one all-reduce of [T, D] if d(hidden) is wanted.
    """
    if grads.hidden is not None:
        reduce_sum_(grads.hidden, group)
    kept = (grads.hidden, grads.weight, grads.bias)
    dtypes = (hidden.dtype, weight.dtype, weight.dtype)
    ctx.save_for_backward(*(None if g is None else g.to(d) for g, d in zip(kept, dtypes, strict=True)))


def scaled_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """The kept gradients times the upstream scalar. Does not communicate: the loss is replicated, so is its gradient."""
    return tuple(None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors)
