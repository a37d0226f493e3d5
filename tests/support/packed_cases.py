"""attention=packed against its definition: documents, inputs, the definition with a dense mask, the comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdtrain.documents import Documents
from kdtrain.models.packed import attend_documents
from kdtrain.models.packed_layout import PackedDocuments

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error of an output or gradient, relative to its own largest element where that is more than 1."""

CUTS = {
    "one token each": [[1] * 7],
    "one per row": [[40], [40], [40]],
    "one row of two": [[13, 24]],
    "rows differ": [[5, 30, 2], [37], [1, 1, 35]],
    "many tiny": [[3, 1, 2, 7, 5, 1, 1, 9, 4, 6, 2, 2, 3] * 2, [5] * 18 + [2]],
    "long and tiny": [[300, 4, 9, 1, 17, 260, 5, 8, 2, 1], [1, 6, 600]],
    "equal": [[64, 64, 64], [64, 64, 64]],
}


def packing_of(rows: Sequence[Sequence[int]]) -> PackedDocuments:
    """Of sequences whose documents have these lengths."""
    lengths = [length for row in rows for length in row]
    (seq_len,) = {sum(row) for row in rows}
    positions = torch.cat([torch.arange(length) for length in lengths]).view(len(rows), seq_len)
    return PackedDocuments(Documents.of(positions))


def inputs(
    packing: PackedDocuments,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    value_width: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """query, key, value as stock models have them: [B, S, heads, width] in memory, seen as [B, heads, S, width]."""
    rng = torch.Generator().manual_seed(seed)
    seq_len = packing.documents.seq_len
    shape = (packing.documents.num_tokens // seq_len, seq_len)
    sizes = ((heads, width), (kv_heads, width), (kv_heads, value_width or width))
    made = [torch.randn(*shape, *size, generator=rng).to(dtype).transpose(1, 2) for size in sizes]
    return [x.requires_grad_() for x in made]


def definition(
    qkv: Sequence[Tensor],
    packing: PackedDocuments,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention with a dense mask of documents, in the inputs' dtype."""
    query, key, value = qkv
    lengths, (batch, heads, seq_len, width) = packing.documents.lengths, query.shape
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).view(batch, 1, seq_len)
    place = torch.arange(seq_len)
    visible = (owner[..., None] == owner[:, :, None]) & (place[:, None] >= place)
    if sliding_window is not None:
        visible &= place[:, None] - place < sliding_window
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -math.inf)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux[None, :, None, None].expand(batch, -1, seq_len, 1)], dim=-1)
    return (logits.softmax(-1)[..., :seq_len] @ value).transpose(1, 2)


def backward(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], packing: PackedDocuments, settings: dict[str, Any]
) -> list[Tensor]:
    """[output, gradients] for a random gradient of the output."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]
    more = dict(settings)
    if "s_aux" in more:
        leaves.append(more["s_aux"].detach().to(leaves[0].dtype).requires_grad_())
        more["s_aux"] = leaves[-1]
    output = function(leaves[:3], packing, **more)
    rng = torch.Generator().manual_seed(9)
    output.backward(torch.randn(output.shape, generator=rng).to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def compare(
    packing: PackedDocuments,
    tensors: Sequence[Tensor],
    function: Callable[..., Tensor] = attend_documents,
    **settings: Any,
) -> None:
    """Assert that `function` is the definition in float64, forward and all gradients."""
    found = backward(function, tensors, packing, settings)
    want = backward(definition, [x.double() for x in tensors], packing, settings)
    tolerance = TOLERANCE[tensors[0].dtype]
    assert found[0].dtype == tensors[0].dtype
    for name, a, b in zip(("output", "query", "key", "value", "sinks"), found, want, strict=False):
        assert a.shape == b.shape, name
        error = (a - b).abs().max() / b.abs().max().clamp(min=1)
        assert error <= tolerance, f"{name}: {error:.1e}"
