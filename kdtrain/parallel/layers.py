"""Tensor-parallel layers on plain local tensors, so that any ZeRO stage can own their parameters.

Activations between blocks are replicated. `hook_block_input` applies `copy_to_tp` to a block's input once, the column
layers compute this rank's output features, and the one row layer sums over the ranks. A block therefore costs one
all-reduce forward and one backward, for any number of column layers. Under sequence parallelism
(`kdtrain.parallel.sequence`) an all-gather and a reduce-scatter replace each all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtrain.distributed.collectives import Collective, Group, copy_to_tp, group_size, reduce_from_tp, reduce_sum_
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.errors import ParallelError


class _Linear(nn.Module):
    """This rank's weight [out, in] and bias."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    @property
    def in_features(self) -> int:
        """Width of this rank's input."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Width of this rank's output."""
        return self.weight.shape[0]


class ColumnParallelLinear(_Linear):
    """y_local = x W_local^T + b_local: replicated [..., in] -> sharded [..., out_local].

    Does not communicate: the hook of the enclosing block (`hook_block_input`) sums the gradient of x.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out_local]."""
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(_Linear):
    """y = sum over ranks of x_local W_local^T, plus b once: sharded [..., in_local] -> replicated [..., out].

    output_comm: the collective that sums. By default one all-reduce forward and nothing backward; the bias and its
    gradient are replicated.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, group: Group, output_comm: Collective = reduce_from_tp
    ) -> None:
        super().__init__(weight, bias)
        self.group = group
        self.output_comm = output_comm

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_local] -> [..., out]."""
        # Each rank has the product of its input features only, a partial sum.
        y = self.output_comm(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Rows [start, stop) of an embedding: zero for ids on other ranks, then the sum over ranks.

    Communicates: one all-reduce forward, nothing backward. `padding_idx` (global id) has torch's meaning: that row
    gets no gradient from the lookup. `scale` multiplies the embeddings; it is a float, not a buffer, so that no cast of
    the model rounds it twice. rounds_scale: round it to the weight's dtype, once, as Gemma does.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        shard: VocabShard,
        group: Group,
        *,
        padding_idx: int | None = None,
        scale: float | None = None,
        rounds_scale: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.shard = shard
        self.group = group
        self.scale = scale
        self.rounds_scale = rounds_scale
        self.padding_idx = padding_idx
        is_local = padding_idx is not None and shard.start <= padding_idx < shard.stop
        self._local_padding_idx = padding_idx - shard.start if is_local and padding_idx is not None else None

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] int64 global ids -> [..., D], replicated.

        On the CPU raises IndexError, on every rank, for an id outside of the vocabulary: its embedding would be zero, a
        padding row at tp 1 and masked on every rank at tp > 1. There is no check on a device: it would synchronise.
        """
        if input_ids.device.type == "cpu":
            self._check(input_ids)
        if group_size(self.group) == 1:
            embedded = F.embedding(input_ids, self.weight, self._local_padding_idx)
        else:
            local = input_ids - self.shard.start
            outside = (local < 0) | (local >= self.shard.rows)
            embedded = F.embedding(local.masked_fill(outside, 0), self.weight, self._local_padding_idx)
            # Each id has its row on one rank; the others contribute zero.
            embedded = reduce_from_tp(embedded.masked_fill(outside.unsqueeze(-1), 0.0), self.group)
        if self.scale is None:
            return embedded
        return embedded * (torch.tensor(self.scale, dtype=embedded.dtype) if self.rounds_scale else self.scale)

    def _check(self, input_ids: Tensor) -> None:
        bad = input_ids[(input_ids < 0) | (input_ids >= self.shard.vocab_size)]
        if bad.numel():
            raise IndexError(
                f"token id {int(bad[0])} is not in [0, {self.shard.vocab_size}), the tokens of the vocabulary"
                "\n  why: it has no row in the embedding\n  fix: prepare the data with this model's tokenizer"
            )


class LmHead(nn.Module):
    """This rank's rows of the head. It computes no logits but calls a `head_fn` with hidden states and rows.

    The loss runs inside the module that holds the weight because ZeRO-3 gathers the weight there.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        shard: VocabShard,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.shard = shard
        self.logit_scale = logit_scale
        self.softcap = softcap

    def head_shard(self) -> HeadShard:
        """The rows as a value. Raises ParallelError while ZeRO-3 has the weight partitioned."""
        if self.weight.shape[0] != self.shard.rows:
            raise ParallelError(
                f"the head's weight has shape {tuple(self.weight.shape)} instead of {self.shard.rows} rows\n"
                "  why: ZeRO-3 keeps it partitioned and gathers it only inside LmHead\n"
                "  fix: pass a head_fn to Backbone.forward instead of reading lm_head_shard"
            )
        return HeadShard(self.weight, self.bias, self.logit_scale, self.softcap)

    def forward(self, hidden: Tensor, head_fn: Callable[[Tensor, HeadShard], Any]) -> Any:
        """hidden [T, D], replicated -> whatever head_fn(hidden, HeadShard) returns."""
        return head_fn(hidden, self.head_shard())


def hook_block_input(
    block: nn.Module, group: Group, input_comm: Collective = copy_to_tp
) -> torch.utils.hooks.RemovableHandle:
    """Apply `input_comm` to the input of `block` (an attention or MLP module), by a forward pre-hook.

    The input is `hidden_states`, as keyword or as the first positional argument. input_comm: by default `copy_to_tp`,
    which communicates nothing forward and one all-reduce backward per call of the block: every rank's column layers
    give a partial gradient of the input.
    """

    def apply(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": input_comm(kwargs["hidden_states"], group)}
        if args and isinstance(args[0], Tensor):
            return (input_comm(args[0], group), *args[1:]), kwargs
        raise ParallelError(
            f"{type(module).__name__} was called without hidden_states as keyword or first argument\n"
            "  fix: set parallel.tp=1 for this architecture"
        )

    return block.register_forward_pre_hook(apply, with_kwargs=True)


def sum_gradient_over_tp(param: Tensor, group: Group) -> Any:
    """Sum the gradient of a replicated parameter that is applied to sharded activations.

    By a tensor hook, which runs before the gradient is accumulated, so every ZeRO stage gets the sum; it is taken in
    float32. Communicates: one all-reduce per backward pass.
    """

    def whole(grad: Tensor) -> Tensor:
        wide = torch.promote_types(grad.dtype, torch.float32)
        share = grad.to(wide, memory_format=torch.contiguous_format, copy=True)
        # Each rank has the gradient from its own features or tokens only; without the sum the copies would diverge.
        return reduce_sum_(share, group).to(grad.dtype)

    return param.register_hook(whole)  # type: ignore[no-untyped-call]
