"""Teachers for the tests of top-k lists and samples, and expected results from whole float64 logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdtrain.distributed.collectives import Group, group_rank, group_size
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import reference, stream
from kdtrain.losses.types import SparseTarget, TopK


def random_teacher(
    num_tokens: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    properties: bool = False,
    integers: bool = False,
    seed: int = 0,
) -> tuple[Tensor, HeadShard]:
    """(hidden [T, 12], whole head). properties: bias, scale and soft-cap. integers: small ones, so that logits are
    exact in any order of summation and full of ties."""
    rng = torch.Generator().manual_seed(seed)
    if integers:
        hidden, weight = (torch.randint(-2, 3, (n, 12), generator=rng) for n in (num_tokens, vocab_size))
        return hidden.to(dtype), HeadShard(weight.to(dtype))
    hidden = torch.randn(num_tokens, 12, generator=rng, dtype=torch.float64).to(dtype)
    weight = (torch.randn(vocab_size, 12, generator=rng, dtype=torch.float64) * 0.8).to(dtype)
    if not properties:
        return hidden, HeadShard(weight)
    return hidden, HeadShard(weight, torch.randn(vocab_size, generator=rng, dtype=torch.float64).to(dtype), 0.8, 9.0)


def shard_of(vocab_size: int, group: Group, multiple: int) -> VocabShard:
    """This rank's shard."""
    return VocabShard.of(vocab_size, group_rank(group), group_size(group), multiple=multiple)


def slab_bytes_for(tokens: int, shard: VocabShard, dtype: torch.dtype) -> int:
    """slab_bytes that give chunks of `tokens` tokens (rounded down to a multiple of 8 from 8 on)."""
    return tokens * stream.row_stride(shard) * (8 if dtype == torch.float64 else 4)


def whole_logits(hidden: Tensor, head: HeadShard) -> Tensor:
    """[T, V] float64."""
    return reference.head_logits(hidden, head, head.weight.shape[0])


def assert_same_topk(got: TopK, logits: Tensor, k: int, temperatures: tuple[float, ...], tolerance: float) -> None:
    """Against a stable descending sort of whole float64 logits [T, V]; ids and their order exactly."""
    values, order = logits.sort(dim=1, descending=True, stable=True)
    assert got.ids.dtype == torch.int32
    assert torch.equal(got.ids.long(), order[:, :k])
    torch.testing.assert_close(got.logits.double(), values[:, :k], rtol=tolerance, atol=tolerance)
    for place, temperature in enumerate(temperatures):
        lse = (logits / temperature).logsumexp(1)
        log_tail = (values[:, k:] / temperature).logsumexp(1) - lse
        torch.testing.assert_close(got.lse[:, place].double(), lse, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got.log_tail[:, place].double(), log_tail, rtol=tolerance, atol=tolerance)


def dense_weights(target: SparseTarget, vocab_size: int) -> Tensor:
    """[T, V] float64: each id's weight, 0 elsewhere."""
    dense = torch.zeros(target.ids.shape[0], vocab_size, dtype=torch.float64)
    return dense.scatter_add_(1, target.ids.clamp(min=0).long(), target.weights.double())


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the largest storage that any operation returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out
