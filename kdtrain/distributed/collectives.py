"""Collectives of layers and losses; each states what it communicates forward and backward.

The convention about factors of tp:

* A scalar loss is *replicated*: every tensor-parallel rank computes the same number, and calls backward on it once.
* A *replicated* activation has a *replicated* gradient: every rank holds the whole gradient, not a share of it.
* A *sharded* weight has the gradient of its own rows or columns.
* A replicated activation that is the input of sharded weights gets a *partial* gradient on each rank's backward;
  `copy_to_tp` sums it, exactly once. Partial outputs of sharded weights are summed forward, by `reduce_from_tp`; their
  (replicated) gradient passes back unchanged.
* Under sequence parallelism activations between blocks are divided by token instead of replicated. Both sums are
  then reduce-scatters (`gather_tokens` backward, `scatter_tokens` forward): the same sum, of which each rank keeps its
  tokens. Parameters applied to divided tokens (norms, the bias of a row layer) have a partial gradient.

Hence no gradient is ever multiplied or divided by tp. Code that differentiates through an all-reduce whose backward is
again an all-reduce has exact losses and gradients that are wrong by a factor of tp.

No function communicates when its group is None or has one rank.

Dtypes: gloo and NCCL transfer and add floats of 16, 32 and 64 bits and integers of 8, 32 and 64. gloo of torch 2.13
sends int16, uint16, uint32 and float8 point to point, but its collectives refuse them. Collectives that do no
arithmetic (gather, broadcast, exchange) therefore transfer every other dtype as bytes, bit for bit; sums refuse it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

Collective = Callable[[Tensor, Group], Tensor]
"""(this rank's tensor, group) -> this rank's result of a collective over the group."""

# The variants with one buffer for all ranks: NCCL would copy a list of tensors into such a buffer first. torch 2.13
# renamed them.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


_CARRIED = frozenset(
    (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
    )
)
"""Dtypes that the collectives of every backend support."""


def _flat(tensor: Tensor) -> Tensor:
    """A contiguous tensor as a flat view that every backend can transfer: its values, or their bytes."""
    row = tensor.view(-1)
    return row if tensor.dtype in _CARRIED else row.view(torch.uint8)


def _check_sum(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _CARRIED:
        raise ValueError(
            f"{name} cannot sum {tensor.dtype}: gloo and NCCL add {', '.join(sorted(map(str, _CARRIED)))}\n"
            "  fix: widen the values first, e.g. with .to(torch.int32) or .float()"
        )


def group_size(group: Group) -> int:
    """Ranks in `group`; 1 for None. Does not communicate."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    """This rank's index in `group`; 0 for None. Does not communicate."""
    return 0 if group is None else dist.get_rank(group)


def reduce_sum_(tensor: Tensor, group: Group) -> Tensor:
    """Sum `tensor` over the group, in place, and return it. Communicates: one all-reduce. Not differentiable.

    Raises ValueError for a dtype that backends cannot add, and for a non-contiguous tensor: the collective would write
    its memory in the wrong order.
    """
    if group_size(group) > 1:
        _check_sum("reduce_sum_", tensor)
        if not tensor.is_contiguous():
            raise ValueError(f"reduce_sum_ needs a contiguous tensor, got strides {tensor.stride()}")
        # Each rank holds one addend.
        dist.all_reduce(tensor, group=group)
    return tensor


def gather_ranks(tensor: Tensor, group: Group) -> Tensor:
    """[...] on every rank -> [ranks, ...], in rank order, bitwise equal everywhere.

    Communicates: one all-gather. Not differentiable.
    """
    return start_gather(tensor, group)()


def start_gather(tensor: Tensor, group: Group) -> Callable[[], Tensor]:
    """Start a `gather_ranks` and return at once; the returned function waits for it and gives the tensor.

    Communicates: one all-gather, which overlaps with computation until that call. All ranks must start and complete
    their gathers in the same order.
    """
    size = group_size(group)
    if size == 1:
        return lambda: tensor.unsqueeze(0)
    mine = tensor.contiguous()
    out = torch.empty((size, *mine.shape), dtype=mine.dtype, device=mine.device)
    # Each rank holds one row of the result. Asynchronous, so that the caller can compute meanwhile.
    work = _all_gather(_flat(out), _flat(mine), group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return out

    return wait


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Every rank's value, in rank order. Communicates: one all-gather of pickled values, which should be small."""
    if group_size(group) == 1:
        return [value]
    found: list[Any] = [None] * group_size(group)
    # Each rank holds one value of the list.
    dist.all_gather_object(found, value, group=group)
    return found


def broadcast_first_(tensor: Tensor, group: Group) -> Tensor:
    """Copy the tensor of the group's first rank into `tensor` and return it. One broadcast. Not differentiable.

    Raises ValueError for a non-contiguous tensor: the collective would write its memory in the wrong order.
    """
    if group_size(group) > 1:
        if not tensor.is_contiguous():
            raise ValueError(f"broadcast_first_ needs a contiguous tensor, got strides {tensor.stride()}")
        # Only the first rank of the group has the values.
        dist.broadcast(_flat(tensor), group=group, group_src=0)
    return tensor


def exchange_ranks(tensor: Tensor, group: Group) -> Tensor:
    """[ranks, ...] -> [ranks, ...]: row j of this rank's tensor goes to rank j, row i of the result is from rank i.

    Communicates: one all-to-all. Not differentiable. Raises ValueError unless dim 0 is the number of ranks.
    """
    size = group_size(group)
    if tensor.shape[0] != size:
        raise ValueError(f"exchange_ranks needs one row per rank, got shape {tuple(tensor.shape)} for {size} ranks")
    if size == 1:
        return tensor
    tensor = tensor.contiguous()
    out = torch.empty_like(tensor)
    # Each rank holds one row for every other rank.
    dist.all_to_all_single(_flat(out), _flat(tensor), group=group)
    return out


class _Transfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, forward: Collective, backward: Collective) -> Tensor:
        ctx.group, ctx.gradient = group, backward
        return forward(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.gradient(grad, ctx.group), None, None, None


def transfer(x: Tensor, group: Group, forward: Collective, backward: Collective) -> Tensor:
    """forward(x, group), with the gradient backward(gradient, group); x itself in a group of one.

    Neither function may change its input. Communicates what the two functions do.
    """
    return x if group_size(group) == 1 else _Transfer.apply(x, group, forward, backward)


def copy_to_tp(x: Tensor, group: Group) -> Tensor:
    """Replicated activation -> input of sharded weights. Communicates: nothing forward, one all-reduce backward."""
    return transfer(x, group, _unchanged, _sum)


def reduce_from_tp(x: Tensor, group: Group) -> Tensor:
    """Partial activation -> replicated. Communicates: one all-reduce forward, nothing backward."""
    return transfer(x, group, _sum, _unchanged)


def gather_tokens(x: Tensor, group: Group) -> Tensor:
    """Own tokens [B, S/tp, D] -> input of sharded weights [B, S, D]. All-gather forward, reduce-scatter backward."""
    return transfer(x, group, _all_tokens, _summed_share)


def scatter_tokens(x: Tensor, group: Group) -> Tensor:
    """Partial [B, S, D] -> own tokens [B, S/tp, D] of the sum. Reduce-scatter forward, all-gather backward."""
    return transfer(x, group, _summed_share, _all_tokens)


def divide_tokens(x: Tensor, group: Group) -> Tensor:
    """Replicated [B, S, D] -> own tokens [B, S/tp, D]. Forward: nothing. Backward: one all-gather.

    Raises ValueError when the ranks do not divide S.
    """
    return transfer(x, group, _own_tokens, _all_tokens)


def join_tokens(x: Tensor, group: Group) -> Tensor:
    """Own tokens [B, S/tp, D] -> replicated [B, S, D]. Forward: one all-gather. Backward: nothing."""
    return transfer(x, group, _all_tokens, _own_tokens)


def _unchanged(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, group: Group) -> Tensor:
    # Every rank has a partial sum; the convention above needs the whole on each. A new contiguous buffer, because
    # autograd may use the incoming one elsewhere.
    return reduce_sum_(x.clone(memory_format=torch.contiguous_format), group)


def _own_tokens(x: Tensor, group: Group) -> Tensor:
    return _shares(x, group)[group_rank(group)].clone()


def _shares(x: Tensor, group: Group) -> Tensor:
    """[B, S, D] -> [ranks, B, S/ranks, D], the tokens of each rank; a view."""
    size = group_size(group)
    if x.dim() != 3 or x.shape[1] % size:
        raise ValueError(f"{size} ranks cannot divide the tokens of activations [B, S, D] = {list(x.shape)}")
    return x.unflatten(1, (size, -1)).transpose(0, 1)


def _all_tokens(x: Tensor, group: Group) -> Tensor:
    # Attention and MLP weights are sharded by feature, so each rank needs all tokens.
    return gather_ranks(x, group).transpose(0, 1).flatten(1, 2).contiguous()


def _summed_share(x: Tensor, group: Group) -> Tensor:
    _check_sum("a reduce-scatter", x)
    shares = _shares(x, group).contiguous()
    mine = torch.empty_like(shares[0])
    # Every rank has a partial sum for all tokens; each needs the whole sum of its own tokens only.
    _reduce_scatter(mine.view(-1), shares.view(-1), group=group)
    return mine
