"""Causal attention within documents that share sequences, with torch's own kernels and without an S x S mask.

B sequences of S tokens, T = B * S, H heads, K heads of keys and values, d their width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtrain.data.documents import Documents


def attend_documents(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, *, scaling: float | None = None, **settings: Any
) -> Tensor:
    """query [B, H, S, d], key, value [B, K, S, d] -> [B, S, H, d]: each token sees its document up to itself."""
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    parts, begin = [], 0
    for length in documents.lengths:
        q, k, v = (x[begin : begin + length].transpose(0, 1)[None] for x in rows)
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)[0])
        begin += length
    return torch.cat(parts, dim=1).transpose(0, 1).reshape(query.transpose(1, 2).shape[:3] + value.shape[3:])
