"""Measure, before a weight is read, whether a model can run on parts of its sequences. Nothing here communicates.

Under context parallelism a rank runs everything but attention on its own tokens. That is correct only if nothing else
mixes tokens (convolutions and recurrent states do), if positions come from position_ids alone, and if all attention
goes through transformers' attention interface with masks that are causal, per document, optionally in sliding windows.
Each depends on code in transformers; each is measured on a tiny random copy of the config to be loaded.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kdtrain.documents import Documents
from kdtrain.errors import ConfigError
from kdtrain.models.attention import PACKED
from kdtrain.models.context import ARGUMENT, PREFIX, Context
from kdtrain.models.probe import TOLERANCE, base_attention, difference, run_on_copy
from kdtrain.models.shrink import VOCAB_SIZE

POINTWISE = "kdtrain_pointwise"
WINDOW = 3
"""Tokens of every window in the copy, small enough to take effect in 12 tokens."""

_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")


def check_context(model: Any, source: str, *, packed: bool = True) -> None:
    """Raise ConfigError unless a model that is sharded by tokens computes the same as the whole model.

    model: the stock model, parameters possibly on meta; it is not run. packed: whether position_ids will restart at
    documents. Builds and runs a tiny random copy on the CPU; leaves torch's random state unchanged.
    """
    attention = str(model.config._attn_implementation)
    attention = PACKED if attention == PACKED else base_attention(model)
    measure = partial(_measure, packed=packed, attention=PREFIX + attention)
    apart, masks = run_on_copy(model, source, measure, small_windows(model.config))
    kind = f"{source} has model_type {model.config.model_type!r} and parallel.cp > 1"
    if apart > TOLERANCE:
        raise ConfigError(
            f"{kind}, but tokens depend on others outside of attention: on half of each sequence, hidden states differ "
            f"by {apart:.2g} of their size\n"
            "  why: each rank would compute with its part of the sequence as if it were all\n"
            "  fix: set parallel.cp=1, or use an architecture with rotary attention only"
        )
    if masks > TOLERANCE:
        raise ConfigError(
            f"{kind}, but its attention is not causal attention within documents and sliding windows: hidden states "
            f"differ by {masks:.2g} of their size\n"
            "  why: masks are built for whole sequences from position_ids and the window alone\n"
            "  fix: set parallel.cp=1, or use an architecture of the Llama, Qwen, GPT-NeoX or Gemma kind"
        )


def small_windows(config: Any) -> dict[str, int]:
    """Settings that make every attention window of `config` a few tokens."""
    settings = config.to_dict()
    return {key: WINDOW for key in _WINDOWS if isinstance(settings.get(key), int)}


def _measure(copy: Any, *, packed: bool, attention: str) -> tuple[float, float]:
    """Relative differences: (dependence on other tokens outside of attention, kdtrain's masks against the model's
    own)."""
    ids = torch.randint(4, VOCAB_SIZE, (2, 12))
    positions = torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])
    if not packed:
        positions = torch.arange(12).expand(2, -1)
    masked = copy.config._attn_implementation

    def hidden(columns: slice, attention: str, **more: Any) -> Tensor:
        copy.config._attn_implementation = attention
        found: Tensor = copy.base_model(
            input_ids=ids[:, columns], position_ids=positions[:, columns], attention_mask=None, use_cache=False, **more
        ).last_hidden_state
        return found

    everything, second = slice(None), slice(6, None)
    context = {ARGUMENT: Context(None, positions, Documents.of(positions))}
    masks = difference(hidden(everything, attention, **context), hidden(everything, masked))
    whole = hidden(everything, POINTWISE)[:, second]
    return difference(hidden(second, POINTWISE), whole), masks


def _pointwise(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **settings: Any
) -> tuple[Tensor, None]:
    """Replaces attention: each token attends only to itself, and its rotated query and key reveal its position."""
    places = query.mean(-1, keepdim=True) + key.mean((1, 3), keepdim=True)
    groups = query.shape[1] // value.shape[1]
    return ((1.0 + places) * value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), None


AttentionInterface.register(POINTWISE, _pointwise)
