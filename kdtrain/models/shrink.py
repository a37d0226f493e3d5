"""Settings of a tiny random copy of a Hugging Face config: few layers, narrow, every kind of layer kept.

How a model handles positions, masks and its head depends on its code and on switches of its config, not on its width or
depth, so it can be measured on a copy that runs in milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of a config that give the number of experts of a mixture, under every name in use."""

TAKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
"""Keys of a config that give the number of experts per token."""

VOCAB_SIZE = 64
"""Tokens of a tiny copy."""

NARROW_HEAD = 16
"""Width of a head in the narrowest copy; rotary embeddings of a quarter of it still have pairs to rotate."""

FULL_WIDTH = "fewer layers only"
"""Name of a copy that is as wide as the model."""

_SPECIAL_IDS = re.compile(r"(bos|eos|pad|sep|cls|mask|unk|decoder_start)_token_id")
_EXPERT_WIDTH = re.compile(r"expert.*intermediate_size|moe_intermediate_size|shared_intermediate_size")
_NO_WIDTH = re.compile(r"vocab|position|length|token|window|layers|heads|chunk|seq")


def tiny_settings(config: Any, layers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (description of the reduction, settings for AutoConfig.for_model), the smallest copy first.

    layers: at least so many decoder layers are kept, and one of each kind that per-layer lists of `config` name.
    Narrow heads do not fit every config (lists with one entry per rotary pair), so a copy with full heads and one of
    full width follow; the last may be large.
    """
    settings = config.to_dict()
    for key in ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures", "model_type"):
        settings.pop(key, None)
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    _keep_layers(config, settings, layers)
    for key, value in settings.items():
        if re.search(r"vocab_size", key) and isinstance(value, int):
            settings[key] = VOCAB_SIZE
        elif _SPECIAL_IDS.fullmatch(key) and value is not None:
            settings[key] = min(value, 3) if isinstance(value, int) else [3]
    _keep_experts(settings)
    head_dim = declared_head_dim(config)
    if head_dim is not None and head_dim > NARROW_HEAD:
        yield "fewer and narrower heads", _narrow(config, settings, NARROW_HEAD)
    if head_dim is not None:
        yield "fewer heads", _narrow(config, settings, head_dim)
    elif hidden := _number(config, "hidden_size"):
        yield "a smaller width", _narrow(config, settings, min(hidden, 2 * NARROW_HEAD))
    yield FULL_WIDTH, settings


def num_layers(config: Any) -> int:
    """Decoder layers of `config`; 0 if it does not give them."""
    return _number(config, "num_hidden_layers") or 0


def _keep_layers(config: Any, settings: dict[str, Any], layers: int) -> None:
    """Cut the number of layers and every per-layer list to the first `layers` and the first of each further kind."""
    total = num_layers(config)
    if total == 0:
        return
    lists = {key: value for key, value in settings.items() if isinstance(value, list) and len(value) == total}
    tables = {key: {int(i): v for i, v in value.items()} for key, value in settings.items() if _is_by_layer(value)}
    kinds = [str([*(v[i] for v in lists.values()), *(v.get(i) for v in tables.values())]) for i in range(total)]
    kept = sorted({*range(min(layers, total)), *(kinds.index(kind) for kind in kinds)}) if total > layers else None
    if kept is None:
        return
    for key, value in lists.items():
        settings[key] = [value[i] for i in kept]
    for key, table in tables.items():
        settings[key] = {new: table[i] for new, i in enumerate(kept) if i in table}
    settings[_real_name(config, "num_hidden_layers")] = len(kept)


def _is_by_layer(value: Any) -> bool:
    """Whether `value` holds settings of some layers by their number ("05"), as Gemma 4's per_layer_config; names of
    labels have numbers too."""
    if not isinstance(value, dict) or not value:
        return False
    return all(str(key).isdigit() and isinstance(settings, dict) for key, settings in value.items())


def _keep_experts(settings: dict[str, Any]) -> None:
    """Reduce the number of experts to the fewest that leave the router a choice: two per group, and one more than a
    token uses."""
    counts = [key for key in COUNTS if isinstance(settings.get(key), int)]
    if not counts:
        return
    taken = max([value for key, value in settings.items() if key in TAKEN and isinstance(value, int)], default=1)
    groups = settings.get("n_group") or 1
    open_groups = min(settings.get("topk_group") or groups, groups)
    per_group = max(2, -(-taken // open_groups), taken // groups + 1)
    for key in counts:
        settings[key] = min(settings[key], groups * per_group)


def _narrow(config: Any, settings: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """At most two groups of at most two heads of `head_dim`; other widths in proportion."""
    heads, kv_heads = declared_heads(config)
    groups = min(kv_heads, 2)
    per_group = min(max(heads // kv_heads, 1), 2)
    hidden = groups * per_group * head_dim
    old_hidden, old_head = _number(config, "hidden_size"), declared_head_dim(config)
    old_inner = _number(config, "intermediate_size")
    new = dict(settings)
    for key, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or _NO_WIDTH.search(key):
            continue
        if key.startswith("rotary"):
            new[key] = min(value, head_dim)
        elif value == old_hidden:
            new[key] = hidden
        elif value == old_inner:
            new[key] = 2 * hidden
        elif _EXPERT_WIDTH.search(key):
            new[key] = min(value, 2 * hidden)
        elif value == old_head:
            new[key] = head_dim
    for key, count in (("num_attention_heads", groups * per_group), ("num_key_value_heads", groups)):
        name = _real_name(config, key)
        if isinstance(new.get(name), int):
            new[name] = count
    return new


def declared_heads(config: Any) -> tuple[int, int]:
    """(query heads, key/value heads), 1 if the config does not give them."""
    heads = _number(config, "num_attention_heads") or 1
    return heads, _number(config, "num_key_value_heads") or heads


def declared_head_dim(config: Any) -> int | None:
    """Width of a head in `config`, explicit or as its share of the hidden size; None if it gives neither."""
    explicit = _number(config, "head_dim")
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    return explicit or (hidden // heads if hidden and heads else None)


def _number(config: Any, key: str) -> int | None:
    """A whole number from the config's data: attributes may be per layer and refuse to be read."""
    found = config.to_dict().get(_real_name(config, key))
    return found if isinstance(found, int) else None


def _real_name(config: Any, key: str) -> str:
    return str((getattr(config, "attribute_map", None) or {}).get(key, key))
