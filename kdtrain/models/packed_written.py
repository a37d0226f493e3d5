"""Causal attention as explicit products, for what torch's kernels lack: soft-capped logits, sinks, dropout on the CPU.

It computes the same as transformers' eager functions, one block of queries at a time, and recomputes each block in the
backward pass, so that few logits exist at once. n documents of L tokens, H heads, K heads of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MOST_LOGITS = 1 << 22
"""Most logits that exist at once (more only if a single query of one document has more)."""

FEW_QUERIES = 64
"""Several documents share a block only if each has at least this many queries in it."""


@dataclass(frozen=True, slots=True)
class Written:
    """The settings of the attention; calling it computes it.

    window: tokens that a query attends to, itself included. softcap: logits become softcap * tanh(logits / softcap).
    sinks [H]: a logit per head that takes weight from all others. dropout: of the weights. Logits and weights are in
    the inputs' dtype, softmax in float32.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    most_logits: int = MOST_LOGITS

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [n, H, L, d], key [n, K, L, d], value [n, K, L, e] -> [n, L, H, e], causal."""
        heads, length = query.shape[1:3]
        most = length if self.window is None else min(length, max(self.window, FEW_QUERIES))
        seen = length if self.window is None else min(length, self.window - 1 + most)
        count = max(1, self.most_logits // (heads * min(length, FEW_QUERIES) * seen))
        rows = max(1, min(most, self.most_logits // (heads * min(count, len(query)) * seen)))
        parts = []
        for q, k, v in zip(*(torch.split(x, count) for x in (query, key, value)), strict=True):
            blocks = [self._block(q, k, v, begin, min(begin + rows, length)) for begin in range(0, length, rows)]
            parts.append(torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _block(self, query: Tensor, key: Tensor, value: Tensor, begin: int, end: int) -> Tensor:
        """[n, R, H, e] of queries begin to end, recomputed in the backward pass."""
        first = 0 if self.window is None else max(0, begin - self.window + 1)
        inputs = (query[:, :, begin:end], key[:, :, first:end], value[:, :, first:end], self.sinks)
        compute = partial(self._compute, begin - first)
        if not torch.is_grad_enabled():
            return compute(*inputs)
        keep = self.dropout > 0
        return cast(Tensor, checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=keep))

    def _compute(self, ahead: int, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
        """query [n, H, R, d], key [n, K, M, d], value [n, K, M, e] -> [n, R, H, e]; query i is token ahead + i."""
        count, heads, rows, _ = query.shape
        groups, length = key.shape[1:3]
        # the heads of a group are stacked along the rows, so keys and values need no copies
        logits = query.reshape(count, groups, heads // groups * rows, -1) @ key.transpose(2, 3) * self.scaling
        logits = logits.view(count, heads, rows, length)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        behind = torch.arange(ahead, ahead + rows, device=key.device)[:, None] - torch.arange(length, device=key.device)
        hidden = behind < 0 if self.window is None else (behind < 0) | (behind >= self.window)
        logits = logits.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            sink = sinks.to(logits.dtype)[None, :, None, None].expand(count, -1, rows, 1)
            logits = torch.cat([logits, sink], dim=-1)
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32)[..., :length].to(query.dtype)
        weights = torch.nn.functional.dropout(weights, self.dropout)
        output = weights.reshape(count, groups, heads // groups * rows, length) @ value
        return output.view(count, heads, rows, -1).transpose(1, 2)
