"""Causal attention within documents that share sequences, with torch's own kernels and without an S x S mask.

B sequences of S tokens, T = B * S, H heads, K heads of keys and values, d the width of keys, e of values. On CUDA in
half precision one variable-length call does it all. Elsewhere there is one call per document, or one for several short
documents, right-padded: causal attention ignores what follows. See docs/design/0016-packed-attention.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from kdtrain.models.attention_limits import flash_fits
from kdtrain.models.packed_layout import Layout, PackedDocuments, Run
from kdtrain.models.packed_sdpa import Sdpa, padded
from kdtrain.models.packed_written import Written

varlen_attn: Any = None
with suppress(ImportError):  # before torch 2.10
    from torch.nn.attention.varlen import varlen_attn

VARLEN, BUCKETS, WRITTEN = "varlen", "buckets", "written"
"""Ways: one variable-length call; calls of torch's scaled_dot_product_attention; matrix products in Python."""

NEEDED = {"scale", "window_size"}
"""Parameters of varlen_attn that torch 2.10 may lack; `enable_gqa`, which 2.11 lacks, can be done without."""

HAS_VARLEN = varlen_attn is not None and set(inspect.signature(varlen_attn).parameters) >= NEEDED

SETTINGS = ("scaling", "dropout", "sliding_window", "softcap", "s_aux")
"""Keyword arguments of transformers' attention functions that change what is computed here."""

UNIMPORTANT = (
    *("cache_position", "deterministic", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "use_cache"),
)
"""Arguments that change nothing here: positions are already in query and key, boundaries come with the documents."""

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query [n, H, L, d], key [n, K, L, d], value [n, K, L, e] -> [n, L, H, e], causal."""


def attend_documents(
    qkv: Sequence[Tensor],
    packing: PackedDocuments,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """query [B, H, S, d], key [B, K, S, d] and value [B, K, S, e] -> [B, S, H, e]: causal attention within documents.

    scaling: of the logits, by default d ** -0.5. sliding_window: tokens that a query attends to, itself included.
    softcap: logits become softcap * tanh(logits / softcap). s_aux [H]: attention sinks. dropout: of the weights.
    Differentiable in the tensors; memory is linear in T. Does not communicate. Raises ValueError for documents of other
    sequences.
    """
    query, _, value = qkv
    documents, (batch, heads, length, width) = packing.documents, query.shape
    if (documents.num_tokens, documents.seq_len) != (batch * length, length):
        raise ValueError(f"documents of {documents.num_tokens} tokens vs query {tuple(query.shape)}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window = {sliding_window}")
    window = None if sliding_window is None or sliding_window >= documents.longest else sliding_window
    scale = width**-0.5 if scaling is None else scaling
    widest = varlen_width(query, value)
    way, _ = plan(
        device_type=query.device.type,
        dtype=query.dtype,
        width=widest,
        written=softcap is not None or s_aux is not None,
        dropout=dropout > 0,
        obstacle=varlen_obstacle(query.device),
        fits=flash_fits(documents.num_tokens, len(documents.lengths), heads, widest),
    )
    if way == VARLEN:
        return by_varlen(_tokens(qkv), packing, scale=scale, window=window).view(batch, length, heads, -1)
    call: Call = Sdpa(packing, scale, window, dropout)
    if way == WRITTEN:
        call = Written(scale, window, softcap, s_aux, dropout)
    if documents.longest == length and len(documents.lengths) == batch:
        return call(*qkv).contiguous()  # no two documents share a sequence
    return by_document(_tokens(qkv), packing, call).view(batch, length, heads, -1)


def plan(
    *,
    device_type: str,
    dtype: torch.dtype,
    width: int,
    written: bool,
    dropout: bool,
    obstacle: str | None,
    fits: bool,
) -> tuple[str, str]:
    """(way, reason). width: of heads in a variable-length call; written: soft-capped logits or sinks; obstacle: why
    there is no variable-length call, or None; fits: whether one can hold the documents (`attention_limits`)."""
    if written:
        return WRITTEN, "torch's kernels support neither soft-capped logits nor sinks"
    if device_type != "cuda":
        if dropout:
            return WRITTEN, f"torch's kernel for {device_type} has no dropout"
        return BUCKETS, f"the device is {device_type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return BUCKETS, f"flash-attention does not compute in {str(dtype).removeprefix('torch.')}"
    if dropout:
        return BUCKETS, "torch's variable-length call has no dropout"
    if width > 256:
        return BUCKETS, f"heads of width {width} are wider than flash-attention's 256"
    if obstacle is not None:
        return BUCKETS, obstacle
    if not fits:
        return BUCKETS, "more documents or elements than one variable-length call can count"
    return VARLEN, "half precision on CUDA"


def varlen_obstacle(device: torch.device) -> str | None:
    """The reason why torch's variable-length attention cannot be used on `device`, or None."""
    if not HAS_VARLEN:
        return f"torch {torch.__version__} has no varlen_attn with {', '.join(sorted(NEEDED))}"
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.version.hip is not None:
        return "varlen_attn has not been verified on ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"flash-attention needs compute capability 8.0, this is {major}.{minor}"


def by_varlen(
    qkv: Sequence[Tensor],
    packing: PackedDocuments,
    *,
    scale: float,
    window: int | None,
    call: Callable[..., Any] = varlen_attn,
) -> Tensor:
    """query [T, H, d], key [T, K, d], value [T, K, e] -> [T, H, e] by one call of `call`, torch's varlen_attn.

    Where `call` has no parameter enable_gqa (torch 2.11), keys and values are repeated for every head of a group.
    """
    query, key, value = qkv
    more = {}
    if (times := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in inspect.signature(call).parameters:
            more["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    width = varlen_width(query, value)
    offsets = packing.offsets(query.device)
    # At least 2: with one query per document flash-attention takes another path, meant for generation.
    longest = max(packing.documents.longest, 2)
    output: Tensor = call(
        *(padded(x, width) for x in (query, key, value)),
        *(offsets, offsets, longest, longest),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **more,
    )
    return output[..., : value.shape[-1]]


def by_document(qkv: Sequence[Tensor], packing: PackedDocuments, call: Call) -> Tensor:
    """query [T, H, d], key [T, K, d], value [T, K, e] -> [T, H, e] by calls for runs of documents, and for buckets."""
    layout = packing.layout(qkv[0].device)
    parts = [torch.split(x, layout.sizes) for x in qkv]
    short = iter(_of_buckets(parts, layout, call))
    outputs = [
        _called(each, stretch, call) if isinstance(stretch, Run) else next(short)
        for stretch, *each in zip(layout.stretches, *parts, strict=True)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _of_buckets(parts: list[tuple[Tensor, ...]], layout: Layout, call: Call) -> tuple[Tensor, ...]:
    """Outputs of the stretches of short documents, in their order."""
    places = [place for place, stretch in enumerate(layout.stretches) if not isinstance(stretch, Run)]
    if not places:
        return ()
    short = [torch.cat([part[place] for place in places]) for part in parts]
    slots = [torch.split(layout.gather(x), [bucket.tokens for bucket in layout.buckets]) for x in short]
    outputs = [_called(each, bucket, call) for bucket, *each in zip(layout.buckets, *slots, strict=True)]
    return torch.split(layout.scatter(torch.cat(outputs)), [layout.sizes[place] for place in places])


def _called(qkv: Sequence[Tensor], run: Run, call: Call) -> Tensor:
    """[tokens of a run, heads, width] each -> [tokens, H, e]."""
    query, key, value = (x.view(run.count, run.length, *x.shape[1:]).transpose(1, 2) for x in qkv)
    return call(query, key, value).flatten(0, 1)


def _tokens(qkv: Sequence[Tensor]) -> list[Tensor]:
    """[B, heads, S, width] each -> [T, heads, width]; views in the layout that stock models have."""
    return [x.transpose(1, 2).flatten(0, 1) for x in qkv]


def varlen_width(query: Tensor, value: Tensor) -> int:
    """The head width of a variable-length call: one width for query, key and value, a multiple of 8."""
    return -(-max(query.shape[-1], value.shape[-1]) // 8) * 8
