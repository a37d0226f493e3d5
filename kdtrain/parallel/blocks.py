"""How the layers of one block (an attention or an MLP) are sharded: which rows or columns go to which rank.

Works on the sizes of the modules; the model may live on the meta device. Does not communicate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from kdtrain.errors import ParallelError
from kdtrain.parallel.heads import HeadSharding, largest_tp
from kdtrain.parallel.plans import FUSED_HALVES, FUSED_QKV
from kdtrain.parallel.shard_spec import ShardSpec, even_spec, fused_spec

_HEAD_MAJOR_QKV = "query_key_value"
"""Name of the one fused projection that is known to be head-major: query, key and value of each head together."""
_PER_QUERY_HEAD = frozenset(("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", _HEAD_MAJOR_QKV))
_PER_KEY_VALUE_HEAD = frozenset(("k_proj", "v_proj"))
_LATENT = "kv_b_proj"


@dataclass(frozen=True, slots=True)
class Block:
    """A module whose children are sharded; its input and output activations are replicated."""

    name: str
    columns: dict[str, str]
    """Modules sharded by output features: full name -> style."""
    row: str
    """The module sharded by input features, whose output is summed over the ranks."""
    partial_grad: tuple[str, ...] = ()
    """Replicated modules applied to sharded activations: their gradient is partial on every rank."""
    per_head: tuple[str, ...] = ()
    """Parameters with one entry per query head (attention sinks), by full name."""
    latent: tuple[str, ...] = ()
    """Replicated projections to a latent and a rotary part; the rotary part goes to this rank's heads directly."""
    copies_inputs: bool = False
    """Whether the column layers sum the gradient of their own inputs, which are not the block's input."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of an attention block: numbers, width, and which rank holds which of them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sharding: HeadSharding


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D: a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def can_cut(module: nn.Module) -> bool:
    """Whether the class of `module` is one that the parallel layers can replace."""
    return type(module) is nn.Linear or is_conv1d(module)


def features(module: Any) -> tuple[int, int]:
    """(input, output) features of a linear layer."""
    out_dim = 1 if is_conv1d(module) else 0
    return module.weight.shape[1 - out_dim], module.weight.shape[out_dim]


def column_specs(name: str, module: Any, spec: ShardSpec) -> Iterator[tuple[str, ShardSpec]]:
    """(parameter name, spec) of weight and bias of a layer whose output features are sharded by `spec`."""
    dim = 1 if is_conv1d(module) else 0
    yield f"{name}.weight", ShardSpec(dim, spec.shards, segments=spec.segments)
    if module.bias is not None:
        yield f"{name}.bias", ShardSpec(0, spec.shards, segments=spec.segments)


def row_specs(name: str, module: Any, spec: ShardSpec) -> Iterator[tuple[str, ShardSpec]]:
    """(parameter name, spec) of the weight of a layer whose input features are sharded by `spec`."""
    # The bias is replicated: it is added once, after the sum over ranks.
    yield f"{name}.weight", ShardSpec(0 if is_conv1d(module) else 1, spec.shards)


def block_specs(model: Any, block: Block, tp_size: int) -> Iterator[tuple[str, ShardSpec]]:
    """A `ShardSpec` for every sharded parameter of the block, by full name.

    Raises ParallelError when its sizes contradict each other or do not fit tp_size.
    """
    heads = block_heads(model, block, tp_size)
    for name, style in block.columns.items():
        module = model.get_submodule(name)
        size = features(module)[1]
        spec = _mlp_spec(model, block, name, style, tp_size) if heads is None else _head_spec(name, size, style, heads)
        if spec.full_size != size:
            raise _misfit(block, f"{name!r} has {size} output features, {spec.full_size} were expected")
        yield from column_specs(name, module, spec)
    row = model.get_submodule(block.row)
    width = features(row)[0]
    if heads is None:
        spec = even_spec(0, width, tp_size)
    else:
        spec = heads.sharding.query_spec(0, width // heads.num_heads)
        for name in block.per_head:
            yield name, heads.sharding.query_spec(0, 1)
    yield from row_specs(block.row, row, spec)


def block_heads(model: Any, block: Block, tp_size: int) -> Heads | None:
    """The heads of an attention block; None for an MLP. Raises ParallelError when there are too few for tp_size."""
    counted = _count_heads(model, block)
    if counted is None:
        return None
    num_heads, num_kv_heads, head_dim = counted
    shareable = {name.rpartition(".")[2] for name in block.columns} >= _PER_KEY_VALUE_HEAD
    most = largest_tp(num_heads, num_kv_heads) if shareable else num_kv_heads
    if tp_size > most:
        what = "query heads" if shareable else "key/value groups"
        raise ParallelError(
            f"parallel.tp = {tp_size} is more than the {most} {what} of {block.name!r}\n"
            f"  why: each rank needs at least one\n  fix: set parallel.tp to at most {most}"
        )
    return Heads(num_heads, num_kv_heads, head_dim, HeadSharding.of(num_heads, num_kv_heads, tp_size))


def _mlp_spec(model: Any, block: Block, name: str, style: str, tp_size: int) -> ShardSpec:
    width = features(model.get_submodule(block.row))[0]
    if tp_size > width:
        raise ParallelError(
            f"parallel.tp = {tp_size} is more than the {width} intermediate features of {block.name!r}\n"
            f"  why: each rank needs at least one\n  fix: set parallel.tp to at most {width}"
        )
    out = features(model.get_submodule(name))[1]
    if out != width * (1 + (style == FUSED_HALVES)):
        raise _misfit(
            block,
            f"it is neither attention (it has no head_dim) nor an MLP: {name!r} has {out} output features, the row "
            f"layer {width} input features",
        )
    return fused_spec([even_spec(0, width, tp_size)] * 2) if style == FUSED_HALVES else even_spec(0, width, tp_size)


def _head_spec(name: str, size: int, style: str, heads: Heads) -> ShardSpec:
    if style == FUSED_QKV:
        key_value = heads.sharding.key_value_spec(0, heads.head_dim)
        return fused_spec([heads.sharding.query_spec(0, heads.head_dim), key_value, key_value])
    if name.rpartition(".")[2] in _PER_KEY_VALUE_HEAD:
        return heads.sharding.key_value_spec(0, size // heads.num_kv_heads)
    return heads.sharding.query_spec(0, size // heads.num_heads)


def _count_heads(model: Any, block: Block) -> tuple[int, int, int] | None:
    """(query heads, key/value heads, head_dim) of attention, None for an MLP; ParallelError if sizes contradict."""
    module = model.get_submodule(block.name)
    sizes = {name.rpartition(".")[2]: features(model.get_submodule(name))[1] for name in block.columns}
    width = features(model.get_submodule(block.row))[0]
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    if _LATENT in sizes:
        head_dim = module.v_head_dim
        heads = kv_heads = width // head_dim
    elif head_dim is None:
        return None
    elif _HEAD_MAJOR_QKV in sizes:
        heads = kv_heads = sizes[_HEAD_MAJOR_QKV] // (3 * head_dim)
    elif FUSED_QKV in block.columns.values():
        heads, kv_heads = width // head_dim, (next(iter(sizes.values())) - width) // (2 * head_dim)
    elif _PER_KEY_VALUE_HEAD | {"q_proj"} <= set(sizes):
        kv_heads = sizes["k_proj"] // head_dim
        heads = width // max(sizes["v_proj"] // max(kv_heads, 1), 1)
    else:
        heads = kv_heads = 0
    unknown = set(sizes) - _PER_QUERY_HEAD - _PER_KEY_VALUE_HEAD if FUSED_QKV not in block.columns.values() else set()
    if (heads < 1 and kv_heads < 1) or unknown:
        raise _misfit(block, f"it has the column layers {sorted(sizes)}; how their rows map to heads is unknown")
    per_kv = {key: size for key, size in sizes.items() if key in _PER_KEY_VALUE_HEAD}
    rest = {key: size for key, size in sizes.items() if key not in per_kv and key in _PER_QUERY_HEAD}
    if kv_heads < 1 or heads % kv_heads or any(size % kv_heads for size in per_kv.values()):
        raise _misfit(block, f"{kv_heads} key/value groups do not divide {sizes} and {width}")
    if any(size % heads for size in (*rest.values(), width)):
        raise _misfit(block, f"{heads} query heads do not divide {sizes} and {width}")
    return heads, kv_heads, head_dim


def _misfit(block: Block, what: str) -> ParallelError:
    return ParallelError(f"block {block.name!r} cannot be cut: {what}\n  fix: set parallel.tp=1 for this architecture")
