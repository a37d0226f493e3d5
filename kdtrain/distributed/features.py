"""Gather or split the last dim of activations over the tensor-parallel axis.

The convention of `collectives` holds: a replicated activation has a replicated, whole gradient.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtrain.distributed.collectives import Group, gather_ranks, group_rank, transfer

Sizes = tuple[int, ...]
"""Width of every rank's part; ranks may hold unequal ones."""


def gather_features(x: Tensor, sizes: Sizes, group: Group) -> Tensor:
    """Sharded [..., sizes[rank]] -> replicated [..., sum of sizes]. Forward: one all-gather. Backward: nothing."""
    return transfer(x, group, partial(_join, sizes=sizes), partial(_local, sizes=sizes))


def split_features(x: Tensor, sizes: Sizes, group: Group) -> Tensor:
    """Replicated [..., sum of sizes] -> sharded [..., sizes[rank]]. Forward: nothing. Backward: one all-gather."""
    return transfer(x, group, partial(_local, sizes=sizes), partial(_join, sizes=sizes))


def _join(x: Tensor, group: Group, sizes: Sizes) -> Tensor:
    padded = F.pad(x, (0, max(sizes) - x.shape[-1]))
    # Each rank holds its own features; the layer that follows, or the gradient of the split, needs all of them.
    parts = gather_ranks(padded, group).unbind(0)
    return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)


def _local(x: Tensor, group: Group, sizes: Sizes) -> Tensor:
    rank = group_rank(group)
    return x.narrow(-1, sum(sizes[:rank]), sizes[rank]).contiguous()
