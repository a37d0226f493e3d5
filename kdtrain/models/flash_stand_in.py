"""A CPU emulation of transformers' flash-attention, for checks on machines without a GPU.

Registered under names that contain "flash", which architectures test for. It applies the settings that transformers
passes to the kernel and ignores those that transformers drops, so a model that depends on a dropped setting computes
different numbers.

B sequences of S tokens, T = B * S, H heads, K heads of keys and values, d their width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from kdtrain.errors import ConfigError
from kdtrain.models.attention import FLASH

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Keyword arguments that separate documents; transformers uses them only if all four are present."""

WITH_SINKS = ("flash_attention_4",)
"""Implementations whose package takes attention sinks; for the others transformers silently drops `s_aux`."""

CALLS = "kdtrain_attention_calls"
"""Attribute of an attention module of a copy: for each of its calls, whether document boundaries were passed."""


def stand_in_name(implementation: str) -> str:
    """The name under which the stand-in for `implementation` is registered."""
    return f"flash_stand_in_{implementation[-1]}"


def note_call(module: nn.Module, apart: bool) -> None:
    """Record in `module` one call of attention, and whether document boundaries were passed."""
    setattr(module, CALLS, [*getattr(module, CALLS, []), apart])


def flash_stand_in(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    implementation: str,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, S, d], key and value [B, K, S, d] -> [B, S, H, d].

    settings: scaling, sliding_window, softcap, is_causal, s_aux and the document boundaries; each may be missing or
    None. Attends to all tokens of a sequence where boundaries are missing, as flash-attention does in batches of
    several sequences. Raises ConfigError for a mask, which flash-attention cannot take.
    """
    if attention_mask is not None:
        raise ConfigError(f"{type(module).__name__} passes a mask of its own")
    apart = all(settings.get(name) is not None for name in BOUNDARIES)
    note_call(module, apart)
    window, softcap, sinks = (settings.get(name) for name in ("sliding_window", "softcap", "s_aux"))
    is_causal, scaling = settings.get("is_causal"), settings.get("scaling")
    batch, heads, length = query.shape[:3]
    rows = torch.arange(batch * length)
    ends = settings[BOUNDARIES[0]].tolist()[1:] if apart else range(length, batch * length + 1, length)
    document = torch.bucketize(rows, torch.tensor(list(ends)), right=True)
    ago = rows[:, None] - rows
    seen = document[:, None] == document
    if module.is_causal if is_causal is None else is_causal:
        seen &= ago >= 0
    if window is not None:
        seen &= ago.abs() < window
    q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (query, key, value))  # [heads, T, d]
    k, v = (x.repeat_interleave(heads // x.shape[0], dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None and implementation in WITH_SINKS:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(heads, len(rows), 1)], dim=-1)
    weights = scores.softmax(-1)[..., : len(rows)]
    return (weights @ v).view(heads, batch, length, -1).permute(1, 2, 0, 3).contiguous(), None


for _implementation in FLASH:
    _name = stand_in_name(_implementation)
    AttentionInterface.register(_name, partial(flash_stand_in, implementation=_implementation))
    AttentionMaskInterface.register(_name, flash_attention_mask)
