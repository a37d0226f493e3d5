"""transformers' sdpa with one additive mask for all layers.

transformers gives torch a bool mask [B, 1, S, S]. Every call converts it to a mask in the dtype of the queries and
keeps that for backward: 2 * B * S * S bytes in bfloat16, times the number of layers. Here the converted mask is made
once, by transformers' own function, and shared by all layers (two masks if some layers have a sliding window).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kdtrain.models.attention import ONE_MASK


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """bool [B, 1, S, S], True where a query attends -> 0 there and -inf elsewhere, in `dtype`; None stays None."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def one_mask(*places: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Tensor | None:
    """transformers' mask function: `sdpa_mask` in the dtype of the embeddings, made once per forward and window."""
    return additive(sdpa_mask(*places, dtype=dtype, **settings), dtype)


def one_mask_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: its sdpa. Does not communicate."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(query.dtype)  # copies only if the dtypes differ
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


AttentionInterface.register(ONE_MASK, one_mask_attention)
AttentionMaskInterface.register(ONE_MASK, one_mask)
