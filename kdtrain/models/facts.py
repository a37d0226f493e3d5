"""What a configuration makes of a model: its size, and how much of it experts are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kdtrain.models.experts import idle_parameters
from kdtrain.parallel.experts import expert_modules


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Of a whole model, on however many ranks it is: its Hugging Face config and its size.

    num_parameters: tied ones once, padding not counted. num_active_parameters: those that a token passes, without the
    experts it is not sent to; as many in a dense model. num_expert_parameters: those packed into tensors of experts.
    """

    config: Any
    num_parameters: int
    num_active_parameters: int
    num_expert_parameters: int


def facts_of(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> ModelFacts:
    """Of a stock model, perhaps cut or on meta, whose full parameters, tied ones once, have `shapes`."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    experts = [f"{name}.{key}" for name, module in expert_modules(model) for key, _ in module.named_parameters()]
    count = sum(sizes.values())
    return ModelFacts(model.config, count, count - idle_parameters(model, shapes), sum(sizes[name] for name in experts))
