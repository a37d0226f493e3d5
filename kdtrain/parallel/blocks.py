"""Where the layers of one block (an attention or an MLP) are cut: which rows or columns go to which rank.

Works on the sizes of the modules; the model may live on the meta device. Does not communicate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from kdtrain.errors import ParallelError
from kdtrain.parallel.cut import Cut, even_cut, fused_cut
from kdtrain.parallel.heads import HeadCut, largest_tp
from kdtrain.parallel.plans import FUSED_HALVES, FUSED_QKV

_HEAD_MAJOR_QKV = "query_key_value"
"""Name of the one fused projection whose rows are known to be head-major: per head its query, key and value."""
_PER_QUERY_HEAD = frozenset(("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", _HEAD_MAJOR_QKV))
_PER_KEY_VALUE_HEAD = frozenset(("k_proj", "v_proj"))
_LATENT = "kv_b_proj"


@dataclass(frozen=True, slots=True)
class Block:
    """A module whose children are sharded: replicated activations enter it, replicated ones leave it."""

    name: str
    columns: dict[str, str]
    """Modules cut by output features, by full name, with their style."""
    row: str
    """The module cut by input features, whose output is summed over the ranks."""
    partial_grad: tuple[str, ...] = ()
    """Replicated modules fed by sharded activations: every rank has only its share of their gradient."""
    per_head: tuple[str, ...] = ()
    """Parameters with one entry per query head (attention sinks), by full name."""
    latent: tuple[str, ...] = ()
    """Replicated projections to a latent and a rotary part, of which only the latter meets sharded activations."""
    copies_inputs: bool = False
    """Whether the column layers sum the gradient of their own inputs, because the block's input is not theirs."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Of an attention block: how many heads it has, of which width, and which of them go where."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    cut: HeadCut


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D: a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def can_cut(module: nn.Module) -> bool:
    """Whether the class of `module` is one that the parallel layers replace."""
    return type(module) is nn.Linear or is_conv1d(module)


def features(module: Any) -> tuple[int, int]:
    """(input, output) features of a linear layer."""
    out_dim = 1 if is_conv1d(module) else 0
    return module.weight.shape[1 - out_dim], module.weight.shape[out_dim]


def column_cuts(name: str, module: Any, cut: Cut) -> Iterator[tuple[str, Cut]]:
    """By name: the cuts of weight and bias of a layer whose output features are cut as `cut` says."""
    dim = 1 if is_conv1d(module) else 0
    yield f"{name}.weight", Cut(dim, cut.pieces, segments=cut.segments)
    if module.bias is not None:
        yield f"{name}.bias", Cut(0, cut.pieces, segments=cut.segments)


def row_cuts(name: str, module: Any, cut: Cut) -> Iterator[tuple[str, Cut]]:
    """By name: the cut of the weight of a layer whose input features are cut as `cut` says; its bias is replicated."""
    yield f"{name}.weight", Cut(0 if is_conv1d(module) else 1, cut.pieces)


def block_cuts(model: Any, block: Block, tp_size: int) -> Iterator[tuple[str, Cut]]:
    """A `Cut` for every sharded parameter of the block, by full name.

    Raises ParallelError when its sizes do not fit each other or tp_size.
    """
    heads = block_heads(model, block, tp_size)
    for name, style in block.columns.items():
        module = model.get_submodule(name)
        size = features(module)[1]
        cut = _mlp_cut(model, block, name, style, tp_size) if heads is None else _head_cut(name, size, style, heads)
        if cut.full_size != size:
            raise _misfit(block, f"{name!r} has {size} output features, {cut.full_size} were expected")
        yield from column_cuts(name, module, cut)
    row = model.get_submodule(block.row)
    width = features(row)[0]
    if heads is None:
        cut = even_cut(0, width, tp_size)
    else:
        cut = heads.cut.query_cut(0, width // heads.num_heads)
        for name in block.per_head:
            yield name, heads.cut.query_cut(0, 1)
    yield from row_cuts(block.row, row, cut)


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
    return Heads(num_heads, num_kv_heads, head_dim, HeadCut.of(num_heads, num_kv_heads, tp_size))


def _mlp_cut(model: Any, block: Block, name: str, style: str, tp_size: int) -> Cut:
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
    return fused_cut([even_cut(0, width, tp_size)] * 2) if style == FUSED_HALVES else even_cut(0, width, tp_size)


def _head_cut(name: str, size: int, style: str, heads: Heads) -> Cut:
    if style == FUSED_QKV:
        key_value = heads.cut.key_value_cut(0, heads.head_dim)
        return fused_cut([heads.cut.query_cut(0, heads.head_dim), key_value, key_value])
    if name.rpartition(".")[2] in _PER_KEY_VALUE_HEAD:
        return heads.cut.key_value_cut(0, size // heads.num_kv_heads)
    return heads.cut.query_cut(0, size // heads.num_heads)


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
