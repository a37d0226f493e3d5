"""Stock attention for a model whose sequences are sharded over a cp group (`kdtrain.parallel.ulysses` exchanges heads).

transformers looks up its attention function by the name in a model's config. kdtrain's functions are registered under
names of their own, used only by models that run under context parallelism; a student and a teacher may have different
head counts, and one of them may have no cp group. Under such a name transformers builds no masks (they would cover only
the local tokens). Masks are built here, by transformers' own functions, from the position_ids of whole sequences.
`Backbone.hidden_states` passes everything an attention call needs as one keyword argument.

B sequences, S tokens of the whole sequence, s = S / cp on this rank, H heads, d their width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kdtrain.distributed.collectives import Group, gather_ranks, group_size
from kdtrain.distributed.mesh import Mesh
from kdtrain.documents import Documents
from kdtrain.errors import ConfigError
from kdtrain.models.attention import IMPLEMENTATIONS, PACKED
from kdtrain.models.one_mask import additive
from kdtrain.models.packed import SETTINGS, UNIMPORTANT, attend_documents
from kdtrain.models.packed_layout import PackedDocuments
from kdtrain.parallel.heads import HeadSharding, largest_tp
from kdtrain.parallel.ulysses import check_heads, gather_sequence, scatter_sequence

PREFIX = "ulysses_"
"""Prefix of a stock implementation's name: the same implementation over a cp group."""

ARGUMENT = "kdtrain_context"
"""Keyword argument that carries a `Context` through stock code to the attention function."""

PER_HEAD = ("s_aux", "position_bias", "cache")
"""Arguments of stock attention that do not match the heads or tokens of a rank after the exchange."""


@dataclass(slots=True)
class Context:
    """Inputs of attention that are shared by all layers of one forward pass.

    group: the cp group. position_ids [B, S]: of whole sequences; None if no mask is needed. documents: their
    boundaries.
    """

    group: Group
    position_ids: Tensor | None
    documents: Documents
    _masks: dict[tuple[Any, ...], Tensor | None] = field(default_factory=dict)
    _packing: PackedDocuments | None = None

    @property
    def packing(self) -> PackedDocuments:
        """The packing layout for attention=packed, built once for all layers."""
        if self._packing is None:
            self._packing = PackedDocuments(self.documents)
        return self._packing

    def mask(self, implementation: str, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """transformers' mask for whole sequences: causal, separating documents, optionally with a sliding window of
        tokens.

        [B, 1, S, S] in `dtype`, to be added to scores, made once per window; None where the implementation needs none
        (flash-attention and packed attention take the documents' boundaries instead). Does not communicate.
        """
        if not needs_mask(implementation):
            return None
        assert self.position_ids is not None
        key = (implementation, window, dtype)
        if key not in self._masks:
            # these functions read nothing else of a model's config, and of the embeddings only shape, dtype and device
            config: Any = SimpleNamespace(_attn_implementation=implementation, is_causal=True, sliding_window=window)
            embeddings = torch.empty(*self.position_ids.shape, 0, dtype=dtype, device=self.position_ids.device)
            create: Callable[..., Any] = create_causal_mask if window is None else create_sliding_window_causal_mask
            # positional: the fourth parameter is called past_key_values in transformers 5.23 and cache since 5.24
            self._masks[key] = additive(create(config, embeddings, None, None, self.position_ids), dtype)
        return self._masks[key]


def needs_mask(implementation: str) -> bool:
    """Whether a stock implementation separates documents by a mask; the others take document boundaries."""
    return not (implementation.startswith("flash") or implementation == PACKED)


def whole_sequences(values: Tensor, group: Group) -> Tensor:
    """[B, s] on every rank of a cp group -> [B, S]. Communicates: one all-gather. Not differentiable."""
    # Attention covers whole sequences, of which each cp rank has a part.
    return values if group_size(group) == 1 else gather_ranks(values, group).transpose(0, 1).flatten(1)


def use_context(model: Any, mesh: Mesh, source: str) -> None:
    """Set up `model`, stock and with all its heads, to run its attention implementation over mesh's cp group.

    Does not communicate. Raises ParallelError on all ranks when the heads of some tp rank cannot be divided over cp.
    """
    settings = model.config.to_dict()
    names = getattr(model.config, "attribute_map", None) or {}
    heads = settings.get(names.get("num_attention_heads", "num_attention_heads"))
    kv_heads = settings.get(names.get("num_key_value_heads", "num_key_value_heads")) or heads
    known = isinstance(heads, int) and isinstance(kv_heads, int)  # otherwise each attention call checks its own heads
    if known and mesh.tp_size <= largest_tp(heads, kv_heads):  # otherwise sharding raises the error
        for start, stop in HeadSharding.of(heads, kv_heads, mesh.tp_size).query:
            check_heads(stop - start, mesh.cp_size, source)
    model.config._attn_implementation = PREFIX + str(model.config._attn_implementation)


def ulysses_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    implementation: str,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, s, d], key and value possibly with fewer heads -> [B, s, H, d].

    implementation: the stock one that computes it on [B, H / cp, S, d]. Communicates: two all-to-alls over the cp
    group, in backward two. Raises ConfigError when the model's own code does what cannot be followed.
    """
    context = settings.pop(ARGUMENT, None)
    foreign = [name for name in PER_HEAD if settings.get(name) is not None]
    if attention_mask is not None:
        foreign.append("a mask of its own")
    if not isinstance(context, Context) or foreign:
        problem = f"passes {', '.join(foreign)}" if foreign else "does not pass its keyword arguments on"
        raise ConfigError(
            f"{type(module).__name__} {problem} to attention, which parallel.cp > 1 cannot follow\n"
            "  why: attention sees whole sequences there, the code around it one part\n  fix: set parallel.cp=1"
        )
    name = type(module).__name__
    # A rank has a part of every sequence and all heads; attention needs whole sequences, of a part of the heads.
    query, key, value = gather_sequence(query, key, value, context.group, what=name)
    settings["position_ids"] = context.position_ids
    mask = context.mask(implementation, settings.get("sliding_window"), query.dtype)
    if implementation == PACKED:
        settings[ARGUMENT] = context
    local = _View(
        module,
        num_key_value_groups=query.shape[1] // key.shape[1],
        config=_View(getattr(module, "config", None), _attn_implementation=implementation),
    )
    output = _stock(module, implementation)(local, query, key, value, mask, **settings)[0]
    return scatter_sequence(output, context.group), None


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: causal attention within each document, without a mask (`models.packed`).

    query [B, H, S, d], key and value possibly with fewer heads -> [B, S, H, d]. Does not communicate. Raises
    ConfigError for a call that packed attention cannot compute.
    """
    context = settings.pop(ARGUMENT, None)
    problem = _not_packed(module, query, key, attention_mask, settings)
    if not isinstance(context, Context) or problem is not None:
        raise ConfigError(
            f"{_name(module)} {problem or 'does not pass its keyword arguments on'} to attention, which "
            "attention=packed cannot follow\n  why: it computes causal attention within documents and nothing else\n"
            "  fix: set attention=sdpa or attention=eager"
        )
    wanted = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    return attend_documents((query, key, value), context.packing, **wanted), None


def _not_packed(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Any, settings: dict[str, Any]
) -> str | None:
    """The argument of a call that `attend_documents` does not support, in words, or None."""
    if attention_mask is not None:
        return "passes a mask of its own"
    causal = settings.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        return "passes non-causal queries"
    if query.shape[2] != key.shape[2]:
        return f"passes {query.shape[2]} queries and {key.shape[2]} keys"
    known = {*SETTINGS, *UNIMPORTANT, "is_causal"}
    foreign = sorted(name for name, value in settings.items() if value is not None and name not in known)
    return f"passes {', '.join(foreign)}" if foreign else None


class _View:
    """An object with some attributes replaced: stock attention reads head counts and names from its module."""

    def __init__(self, original: object, **replaced: object) -> None:
        self._original = original
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _name(module: object) -> str:
    """The class name of a module, or of the module behind a view."""
    return type(module._original if isinstance(module, _View) else module).__name__


def _stock(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    """The stock function; eager attention is defined beside each architecture."""
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]  # type: ignore[no-any-return]
    found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise ConfigError(
            f"{type(module).__module__} defines no eager_attention_forward, which attention=eager needs with "
            "parallel.cp > 1\n  fix: set attention=sdpa, or parallel.cp=1"
        )
    return found  # type: ignore[no-any-return]


AttentionInterface.register(PACKED, packed_attention)
for _implementation in IMPLEMENTATIONS:
    AttentionInterface.register(PREFIX + _implementation, partial(ulysses_attention, implementation=_implementation))
