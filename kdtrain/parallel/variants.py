"""Tensor-parallel layers for other inputs, outputs and weight layouts than those of `layers`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtrain.distributed.collectives import Group, copy_to_tp
from kdtrain.distributed.features import Sizes, gather_features, split_features
from kdtrain.parallel.layers import ColumnParallelLinear, RowParallelLinear


class _InputsFirst:
    """Sizes of a layer whose weight is [in, out]."""

    weight: nn.Parameter

    @property
    def in_features(self) -> int:
        """Width of this rank's input."""
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """Width of this rank's output."""
        return self.weight.shape[1]


class ColumnParallelConv1D(_InputsFirst, ColumnParallelLinear):
    """ColumnParallelLinear for transformers' Conv1D, whose weight is [in, out_local]."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out_local]. Does not communicate."""
        return F.linear(x, self.weight.t(), self.bias)


class RowParallelConv1D(_InputsFirst, RowParallelLinear):
    """RowParallelLinear for transformers' Conv1D, whose weight is [in_local, out]."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_local] -> [..., out]."""
        # Each rank has the product of its input features only, a partial sum.
        y = self.output_comm(F.linear(x, self.weight.t()), self.group)
        return y if self.bias is None else y + self.bias


class CopyingColumnLinear(ColumnParallelLinear):
    """A column layer that sums the gradient of its own input, because that is not the input of its block.

    Communicates: nothing forward, one all-reduce backward.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: Group) -> None:
        super().__init__(weight, bias)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Replicated [..., in] -> sharded [..., out_local]."""
        # The backward gives each rank the gradient from its own output features only.
        return super().forward(copy_to_tp(x, self.group))


class GatheredColumnLinear(CopyingColumnLinear):
    """A column layer whose output is gathered: replicated [..., in] -> replicated [..., out].

    Every rank computes the layers after it. Communicates: one all-gather forward, one all-reduce backward.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: Group, sizes: Sizes) -> None:
        super().__init__(weight, bias, group)
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        """Replicated [..., in] -> replicated [..., out]."""
        # The model combines all features or heads after this layer.
        return gather_features(super().forward(x), self.sizes, self.group)


class SplitInputRowLinear(RowParallelLinear):
    """A row layer that takes its features of a replicated input: replicated [..., in] -> replicated [..., out].

    Communicates: one all-reduce forward, one all-gather backward.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: Group, sizes: Sizes) -> None:
        super().__init__(weight, bias, group)
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        """Replicated [..., in] -> replicated [..., out]."""
        # Only the backward communicates: each rank has the gradient of its own features.
        return super().forward(split_features(x, self.sizes, self.group))


class LatentLinear(nn.Module):
    """The replicated projection of latent attention, [..., in] -> [..., latent + rope].

    Its first `latent` outputs are the input of column layers that sum its gradient themselves; the others go to every
    rank's heads directly, so their gradient is summed here. Communicates: nothing forward, one all-reduce backward.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: Group, latent: int) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.group = group
        self.latent = latent

    def forward(self, x: Tensor) -> Tensor:
        """Replicated [..., in] -> replicated [..., latent + rope]."""
        y = F.linear(x, self.weight, self.bias)
        # The rotary part is the input of this rank's heads only, so its gradient is partial.
        return torch.cat([y[..., : self.latent], copy_to_tp(y[..., self.latent :], self.group)], -1)
