"""Causal attention of documents of one length by torch's scaled_dot_product_attention, in memory linear in the length.

torch's kernels materialise all L x L logits if values have another width than keys or if they do not support grouped
heads, and an explicit mask has L x L elements too. None of these is used for long documents. n documents of L tokens, H
heads, K heads of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtrain.models.attention_limits import sequences_per_call
from kdtrain.models.packed_layout import PackedDocuments

SMALL_BLOCK, LARGE_BLOCK = 128, 1024
"""Bounds of the queries in a block of a sliding window; between them, a quarter of the window."""


@dataclass(frozen=True, slots=True)
class Sdpa:
    """The settings of the attention; calling it computes it.

    window: tokens that a query attends to, itself included.
    """

    packing: PackedDocuments
    scale: float
    window: int | None = None
    dropout: float = 0.0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [n, H, L, d], key [n, K, L, d], value [n, K, L, e] -> [n, L, H, e], causal."""
        length, width = query.shape[2], value.shape[-1]
        widest = max(query.shape[-1], width)
        query, key, value = (padded(x, widest) for x in (query, key, value))
        if query.device.type != "cpu" and key.shape[1] < query.shape[1]:
            # the memory-efficient kernel does not support grouped heads
            key, value = (repeated(x, query.shape[1] // key.shape[1]) for x in (key, value))
        window = self.window
        if window is None or window >= length:
            output = self._kernel(query, key, value)
        elif length <= 2 * SMALL_BLOCK:
            band = self.packing.band(2 * SMALL_BLOCK, 0, window, query)
            output = self._kernel(query, key, value, band[:length, :length])
        else:
            each = zip(*(torch.split(x, 1) for x in (query, key, value)), strict=True)
            output = torch.cat([self._banded(window, q, k, v) for q, k, v in each])
        return output[..., :width]

    def _banded(self, window: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One document, longer than the window: [1, H, L, d], keys and values alike -> [1, L, H, d].

        The first `window` queries attend to all preceding tokens. The others are computed in blocks of R queries, each
        against a band of window - 1 + R keys (overlapping views), all full blocks in one call, the remainder in
        another.
        """
        rows = min(max(window // 4, SMALL_BLOCK), LARGE_BLOCK)
        count, rest = divmod(query.shape[2] - window, rows)
        first, whole, last = torch.split(query, [window, count * rows, rest], dim=2)
        outputs = [self._kernel(first, key[:, :, :window], value[:, :, :window])]
        band = self.packing.band(rows, window - 1, window, query)
        if count:
            blocks = whole[0].view(-1, count, rows, whole.shape[3]).transpose(0, 1)
            k, v = (x[0, :, 1 : window + count * rows].unfold(1, window - 1 + rows, rows) for x in (key, value))
            made = self._kernel(blocks, k.permute(1, 0, 3, 2), v.permute(1, 0, 3, 2), band)
            outputs.append(made.flatten(0, 1)[None])
        if rest:
            k, v = (x[:, :, count * rows + 1 :] for x in (key, value))
            outputs.append(self._kernel(last, k, v, band[:rest, : window - 1 + rest]))
        return torch.cat(outputs, dim=1)

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """[n, H, R, d], [n, K, M, d] twice -> [n, R, H, d], causal or as `mask` has it, in calls kernels can count."""
        most = sequences_per_call(max(query.shape[2], key.shape[2]), query.shape[1], query.shape[3])
        parts = [
            F.scaled_dot_product_attention(
                *(q, k, v, mask, self.dropout),
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            ).transpose(1, 2)
            for q, k, v in zip(*(torch.split(x, most) for x in (query, key, value)), strict=True)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def repeated(heads: Tensor, times: int) -> Tensor:
    """[n, K, L, d] -> [n, K * times, L, d], each head `times` times in a row."""
    return heads[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


def padded(heads: Tensor, width: int) -> Tensor:
    """[..., d] -> [..., width], zeros at the end; the tensor itself if it has that width."""
    return F.pad(heads, (0, width - heads.shape[-1])) if heads.shape[-1] < width else heads
