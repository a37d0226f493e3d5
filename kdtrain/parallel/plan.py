"""From a stock Hugging Face causal language model to a `Cut` for every parameter that tensor parallelism shards.

The model declares a style per module in `model.tp_plan`; the sizes come from its modules. Nothing here imports
transformers, touches weights or communicates: the model may live on the meta device.

Supported styles: colwise, rowwise, replicated_with_grad_allreduce, embedding_rowwise, and for the head any style,
because the head is always cut by vocabulary rows. Attention is cut between key/value groups (a key/value head with
the query heads that read it), so that stock attention code, which infers head counts from shapes, works on a shard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from kdtrain.errors import ParallelError
from kdtrain.parallel.cut import Cut, even_cut, padded_cut
from kdtrain.parallel.experts import EXPERTS, expert_cuts, forgotten_styles

COLWISE = "colwise"
ROWWISE = "rowwise"
PARTIAL_GRAD = "replicated_with_grad_allreduce"
EMBEDDING = "embedding_rowwise"
HEAD = "vocab_parallel_head"
_BODY_STYLES = (COLWISE, ROWWISE, PARTIAL_GRAD, EMBEDDING)
_FUSED_QKV = "query_key_value"
"""Name of the one fused projection whose rows are known to be head-major: per head its query, key and value."""


@dataclass(frozen=True, slots=True)
class Block:
    """A module whose children are sharded: replicated activations enter it, replicated ones leave it."""

    name: str
    columns: tuple[str, ...]
    """Modules cut by output features, by full name."""
    row: str
    """The module cut by input features, whose output is summed over the ranks."""
    partial_grad: tuple[str, ...]
    """Replicated modules fed by sharded activations: every rank has only its share of their gradient."""


@dataclass(frozen=True, slots=True)
class TpPlan:
    """Where a model is cut: names of modules, and blocks in forward order."""

    embedding: str
    head: str
    blocks: tuple[Block, ...]


def read_plan(model: Any) -> TpPlan:
    """The model's own merged plan, resolved to module names and checked for completeness.

    Raises ParallelError, naming style and module, for a style, a class or a block that cannot be cut safely.
    """
    embedding, head = vocabulary_modules(model)
    styles = _styles_by_module(model)
    blocks: dict[str, dict[str, str]] = {}
    for name, style in styles.items():
        if name in (embedding, head) or style == EXPERTS:  # experts are found by what they are
            continue
        if style not in _BODY_STYLES:
            raise ParallelError(
                f"tensor-parallel style {style!r} of module {name!r} ({type(model).__name__}) is not supported\n"
                f"  why: kdtrain cuts {', '.join(_BODY_STYLES)} and the head\n"
                "  fix: set parallel.tp=1, or use an architecture of the Llama, Qwen or GPT-NeoX kind"
            )
        if style == EMBEDDING:
            raise ParallelError(
                f"module {name!r} is planned as {style!r} but is not the input embedding ({embedding!r})\n"
                "  fix: set parallel.tp=1; this architecture has a second embedding that kdtrain cannot cut"
            )
        blocks.setdefault(name.rpartition(".")[0], {})[name] = style
    if not blocks and EXPERTS not in styles.values():
        raise ParallelError(
            f"{type(model).__name__} declares no tensor-parallel plan\n  fix: set parallel.tp=1 for this architecture"
        )
    return TpPlan(embedding, head, tuple(_block(model, parent, children) for parent, children in blocks.items()))


def vocabulary_modules(model: Any) -> tuple[str, str]:
    """Names of the input embedding and of the head. Raises ParallelError when the model has no such modules."""
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter)()
        if module is None or id(module) not in names or getattr(module, "weight", None) is None:
            raise ParallelError(
                f"{type(model).__name__}.{getter}() names no module with a weight: not a causal language model\n"
                "  fix: use a decoder-only architecture that ends in a linear head"
            )
        found.append(names[id(module)])
    return found[0], found[1]


def plan_cuts(model: Any, tp_size: int, vocab_rows: int) -> dict[str, Cut]:
    """A `Cut` for every sharded parameter, by Hugging Face parameter name; replicated ones are absent.

    vocab_rows: rows of the vocabulary per rank, padding included (`VocabShard.rows`). Embedding and head are cut at
    any tp_size, 1 included, because that padding applies there too. A tied weight has both of its names.
    Raises ParallelError when the model cannot be cut over tp_size ranks.
    """
    embedding, head = vocabulary_modules(model)
    cuts: dict[str, Cut] = {}
    for name in (embedding, head):
        for key, param in model.get_submodule(name).named_parameters(recurse=False):
            cuts[f"{name}.{key}"] = padded_cut(0, param.shape[0], tp_size, vocab_rows)
    if tp_size > 1:
        for block in read_plan(model).blocks:
            cuts.update(_block_cuts(model, block, tp_size))
        cuts.update(expert_cuts(model, tp_size))
    return cuts


def _styles_by_module(model: Any) -> dict[str, str]:
    """Module name -> style, wildcards of the plan expanded, in the model's own order."""
    plan = getattr(model, "tp_plan", None) or {}
    plan = {**plan, **forgotten_styles(model, plan)}
    patterns = [(re.compile(re.escape(key).replace(r"\*", r"\d+")), style) for key, style in plan.items()]
    styles: dict[str, str] = {}
    targets = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    ordered = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for name in ordered:
        for pattern, style in patterns:
            if pattern.fullmatch(name):
                styles[name] = style
    planned_modules = set(styles)
    for name in list(styles):
        # A plan may name a module and, again, its weight; the module says all there is to say.
        parent = name.rpartition(".")[0]
        if parent in planned_modules and parent in targets:
            del styles[name]
    return styles


def _block(model: Any, parent: str, children: dict[str, str]) -> Block:
    columns = tuple(name for name, style in children.items() if style == COLWISE)
    rows = tuple(name for name, style in children.items() if style == ROWWISE)
    partial = tuple(name for name, style in children.items() if style == PARTIAL_GRAD)
    module = model.get_submodule(parent)
    if not columns or len(rows) != 1:
        raise ParallelError(
            f"block {parent!r} ({type(module).__name__}) has {len(columns)} colwise and {len(rows)} rowwise modules\n"
            "  why: replicated activations must enter through columns and leave through exactly one row layer\n"
            "  fix: set parallel.tp=1 for this architecture"
        )
    for name in (*columns, *rows):
        if type(model.get_submodule(name)) is not nn.Linear:
            raise ParallelError(
                f"module {name!r} is a {type(model.get_submodule(name)).__name__}; only torch.nn.Linear can be cut\n"
                "  fix: set parallel.tp=1 for this architecture"
            )
    for name, _ in module.named_parameters():
        owner = f"{parent}.{name}".rpartition(".")[0]
        if not any(owner == known or owner.startswith(known + ".") for known in children):
            raise ParallelError(
                f"parameter {parent + '.' + name!r} lives in a sharded block but the model's plan does not mention it\n"
                "  why: its gradient would silently be only one rank's share\n"
                "  fix: set parallel.tp=1 for this architecture"
            )
    return Block(parent, columns, rows[0], partial)


def _block_cuts(model: Any, block: Block, tp_size: int) -> Iterator[tuple[str, Cut]]:
    columns = {name: model.get_submodule(name).out_features for name in block.columns}
    row_features = model.get_submodule(block.row).in_features
    num_units, what = _num_units(model, block, columns, row_features)
    if tp_size > num_units:
        raise ParallelError(
            f"parallel.tp = {tp_size} is more than the {num_units} {what} of {block.name!r}\n"
            f"  why: each rank needs at least one\n  fix: set parallel.tp to at most {num_units}"
        )
    for name in block.columns:
        module = model.get_submodule(name)
        cut = even_cut(0, columns[name], tp_size, columns[name] // num_units)
        yield f"{name}.weight", cut
        if module.bias is not None:
            yield f"{name}.bias", cut
    yield f"{block.row}.weight", even_cut(1, row_features, tp_size, row_features // num_units)


def _num_units(model: Any, block: Block, columns: dict[str, int], row_features: int) -> tuple[int, str]:
    """How many indivisible pieces a block has, and what they are called."""
    module = model.get_submodule(block.name)
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    short = {name.rpartition(".")[2]: size for name, size in columns.items()}
    if head_dim is None:
        if len(set(short.values())) != 1 or row_features not in short.values():
            raise ParallelError(
                f"block {block.name!r} is neither attention (it has no head_dim) nor an MLP whose column layers "
                f"({short}) all match its row layer ({row_features})\n  fix: set parallel.tp=1 for this architecture"
            )
        return row_features, "intermediate features"
    if set(short) == {_FUSED_QKV}:
        num_groups = short[_FUSED_QKV] // (3 * head_dim)
    elif {"q_proj", "k_proj", "v_proj"} == set(short):
        num_groups = short["k_proj"] // head_dim
    else:
        raise ParallelError(
            f"attention {block.name!r} has the column layers {sorted(short)}; how their rows map to heads is unknown\n"
            "  fix: set parallel.tp=1 for this architecture"
        )
    if num_groups < 1 or any(size % num_groups for size in (*short.values(), row_features)):
        raise ParallelError(
            f"attention {block.name!r}: {num_groups} key/value groups do not divide {short} and {row_features}\n"
            "  fix: set parallel.tp=1 for this architecture"
        )
    return num_groups, "key/value groups"
