"""Parameters of a bfloat16 student that its class keeps in float32, and how they stay so under DeepSpeed.

DeepSpeed 0.19.8 rounds every parameter to bfloat16 when its engine starts, just before it calls the function that makes
the optimizer; values that this function restores are kept, in parameter groups of their own. The gradients of those
groups are exact at stage 1 and rounded to bfloat16, as all others are, at stage 2. Stage 3 flattens all groups into one
tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdtrain.config.schema import Dtype
from kdtrain.errors import ConfigError

if TYPE_CHECKING:
    from kdtrain.models.backbone import Backbone


def float32_beside_bfloat16(backbone: Backbone, dtype: Dtype) -> dict[str, nn.Parameter]:
    """The student's parameters that stay in float32 in a bfloat16 run, by name; empty in float32. dtype: of the run."""
    named = backbone.hf_parameters() if dtype == "bfloat16" else ()
    return {name: param for name, param in named if param.dtype == torch.float32}


def refuse_float32_at_stage_3(names: Sequence[str], stage: int) -> None:
    """Raise ConfigError if a bfloat16 student has parameters `names` that stay in float32 and zero.stage is 3."""
    if names and stage == 3:
        raise ConfigError(
            f"zero.stage = 3 and student.dtype = bfloat16 do not go together here: {names[0]!r} stays in float32 "
            f"({len(names)} such parameters)\n"
            "  why: transformers keeps them so, and DeepSpeed's stage 3 has one dtype for all parameters\n"
            "  fix: set zero.stage=2 (or 1), or student.dtype=float32"
        )


def putting_back(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]
) -> Callable[[Any], torch.optim.Optimizer]:
    """A function that returns `optimizer` after restoring the values that `parameters` have now."""
    values: list[tuple[nn.Parameter, Tensor]] = [(param, param.detach().clone()) for param in parameters]

    def make(_: Any) -> torch.optim.Optimizer:
        for param, value in values:
            param.data = value.to(param.device)
        return optimizer

    return make
