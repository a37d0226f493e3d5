"""Config and size of a model, with the share of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kdtrain.models.experts import idle_parameters
from kdtrain.parallel.experts import expert_modules


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The Hugging Face config and the size of a whole model, independent of the number of ranks that hold it.

    num_parameters: tied ones once, padding not counted. num_active_parameters: those that a token uses, without the
    experts that it is not routed to; equal to num_parameters in a dense model. num_expert_parameters: those packed into
    tensors of experts. float32: names of those that stay in float32 although the model is in bfloat16.
    num_float32_parameters: how many.
    """

    config: Any
    num_parameters: int
    num_active_parameters: int
    num_expert_parameters: int
    float32: tuple[str, ...]
    num_float32_parameters: int


def info_of(model: Any, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> ModelInfo:
    """Info of a stock model, possibly sharded or on meta, whose full parameters (tied ones once) have `shapes` and
    `dtypes`."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    experts = [f"{name}.{key}" for name, module in expert_modules(model) for key, _ in module.named_parameters()]
    count = sum(sizes.values())
    mixed = model.config.dtype == torch.bfloat16
    float32 = tuple(name for name in sizes if mixed and dtypes[name] == torch.float32)
    return ModelInfo(
        config=model.config,
        num_parameters=count,
        num_active_parameters=count - idle_parameters(model, shapes),
        num_expert_parameters=sum(sizes[name] for name in experts),
        float32=float32,
        num_float32_parameters=sum(sizes[name] for name in float32),
    )
