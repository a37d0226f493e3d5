"""AdamW's parameter groups and the learning rate as a function of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from kdtrain.config.schema import OptimSection, ScheduleSection


def learning_rate(tokens_seen: int, schedule: ScheduleSection, *, peak: float, total_tokens: int) -> float:
    """The rate once `tokens_seen` tokens have been trained on; pure, the same in every layout.

    Linear warm-up over schedule.warmup_tokens, then the shape: cosine and linear fall to min_lr_ratio * peak at
    total_tokens; wsd (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) stays and falls linearly over
    the last decay_tokens; constant stays.
    """
    s, total = schedule, total_tokens
    if tokens_seen < s.warmup_tokens:
        return peak * tokens_seen / s.warmup_tokens
    floor = s.min_lr_ratio
    if s.shape == "constant":
        return peak
    if s.shape == "wsd":
        length = s.decay_tokens if s.decay_tokens is not None else total // 10
        begin = total - length
    else:
        begin, length = s.warmup_tokens, total - s.warmup_tokens
    share = min(1.0, max(0.0, (tokens_seen - begin) / length)) if length > 0 else 0.0
    fall = 0.5 * (1.0 + math.cos(math.pi * share)) if s.shape == "cosine" else 1.0 - share
    return peak * (floor + (1.0 - floor) * fall)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and other vectors do not. Order within a group is the model's.

    Parameters of one group have one dtype, as DeepSpeed requires; bfloat16 comes before float32.
    """
    # Dimensions are read from the parameter: this must happen before ZeRO-3 flattens it.
    parameters = [p for _, p in named if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for dtype in sorted({p.dtype for p in parameters}, key=lambda dtype: dtype.itemsize):
        matrices = [p for p in parameters if p.dtype == dtype and p.dim() >= 2]
        vectors = [p for p in parameters if p.dtype == dtype and p.dim() < 2]
        groups += [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_adamw(
    named: Iterable[tuple[str, nn.Parameter]],
    settings: OptimSection,
    device: torch.device,
    *,
    offload: bool = False,
) -> torch.optim.AdamW:
    """torch's AdamW, the fused kernel on CUDA and, with `offload`, on the host: nothing is compiled at run time."""
    groups = parameter_groups(named, settings.weight_decay)
    fused = offload or device.type == "cuda"
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)
