"""Put together or take apart the last dim of activations over the tensor-parallel axis; `collectives` has the rules.

Both sides of each function keep its convention: a replicated activation has a replicated, whole gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtrain.dist.collectives import Group, gather_ranks, group_rank

Sizes = tuple[int, ...]
"""Width of every rank's part; ranks may hold unequal ones."""


def gather_features(x: Tensor, sizes: Sizes, group: Group) -> Tensor:
    """Sharded [..., sizes[rank]] -> replicated [..., sum of sizes]. Forward: one all-gather. Backward: nothing."""
    return x if len(sizes) == 1 else _Gather.apply(x, sizes, group)


def split_features(x: Tensor, sizes: Sizes, group: Group) -> Tensor:
    """Replicated [..., sum of sizes] -> sharded [..., sizes[rank]]. Forward: nothing. Backward: one all-gather."""
    return x if len(sizes) == 1 else _Split.apply(x, sizes, group)


def _join(x: Tensor, sizes: Sizes, group: Group) -> Tensor:
    padded = F.pad(x, (0, max(sizes) - x.shape[-1]))
    parts = gather_ranks(padded, group).unbind(0)
    return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)


def _own(x: Tensor, sizes: Sizes, group: Group) -> Tensor:
    rank = group_rank(group)
    return x.narrow(-1, sum(sizes[:rank]), sizes[rank])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sizes, group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _join(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _own(grad, ctx.sizes, ctx.group), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sizes, group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _own(x, sizes, group).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _join(grad, ctx.sizes, ctx.group), None, None
