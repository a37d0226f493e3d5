"""The tensor-parallel plan of a stock Hugging Face causal language model: a `ShardSpec` per sharded parameter.

The model declares a style per module in `model.tp_plan`, and `plans` adds to it; the sizes come from its modules.
Nothing here imports transformers, touches weights or communicates: the model may live on the meta device.

Attention is divided between query heads, each with its key/value head, so that stock attention code, which infers head
counts from shapes, works on a shard (`blocks`, `heads`). The language-model head is always sharded by vocabulary rows,
whatever its style.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from kdtrain.errors import ParallelError
from kdtrain.parallel.blocks import Block, block_specs, can_cut, column_specs, features, row_specs
from kdtrain.parallel.experts import EXPERTS, expert_specs, missing_styles
from kdtrain.parallel.plans import (
    COLWISE,
    COPYING,
    FUSED_HALVES,
    FUSED_QKV,
    GATHERED,
    OWN_PLANS,
    PARTIAL_GRAD,
    REPLICATED,
    ROWWISE,
    SPLIT_INPUT,
    OwnPlan,
)
from kdtrain.parallel.shard_spec import ShardSpec, even_spec, padded_spec

EMBEDDING = "embedding_rowwise"
LATENT = "mla_kv_a_proj"
LOCAL_PARAMETERS = "local_params"
"""Style of a module whose parameters have individual styles."""
_COLUMNS = (COLWISE, COPYING, FUSED_QKV, FUSED_HALVES)
_BLOCK_STYLES = (*_COLUMNS, ROWWISE, PARTIAL_GRAD, LATENT)
_ALONE = (GATHERED, SPLIT_INPUT)
_IGNORED = (REPLICATED, LOCAL_PARAMETERS, EXPERTS)
"""Styles that need no layer here: replicated modules, and experts, which `experts` finds by their parameters."""
_BEFORE_LATENT = ("q_a_proj", "q_a_layernorm", "kv_a_layernorm")
"""Replicated modules of latent attention before all column layers."""


@dataclass(frozen=True, slots=True)
class TpPlan:
    """The sharded modules of a model by name, and its blocks in forward order.

    gathered, split: column and row layers outside of blocks, with replicated input and output.
    """

    embedding: str
    head: str
    blocks: tuple[Block, ...]
    gathered: tuple[str, ...] = ()
    split: tuple[str, ...] = ()


def read_plan(model: Any) -> TpPlan:
    """The model's plan, overridden by kdtrain's, resolved to module names and checked for completeness.

    Raises ParallelError, naming style and module, for a style, a class or a block that cannot be sharded safely.
    """
    embedding, head = vocabulary_modules(model)
    styles = {name: style for name, style in _styles_by_module(model).items() if name not in (embedding, head)}
    blocks: dict[str, dict[str, str]] = {}
    alone: dict[str, str] = {}
    for name, style in styles.items():
        if style in _ALONE:
            alone[name] = style
        elif style in _BLOCK_STYLES:
            blocks.setdefault(name.rpartition(".")[0], {})[name] = style
        elif style not in _IGNORED:
            raise _unsupported(model, name, style)
    if not blocks and not alone and EXPERTS not in styles.values():
        raise ParallelError(
            f"{type(model).__name__} declares no tensor-parallel plan\n  fix: set parallel.tp=1 for this architecture"
        )
    for name in alone:
        _check_alone(model, name, blocks)
    return TpPlan(
        embedding,
        head,
        tuple(_block(model, parent, children) for parent, children in blocks.items()),
        tuple(name for name, style in alone.items() if style == GATHERED),
        tuple(name for name, style in alone.items() if style == SPLIT_INPUT),
    )


def own_plan(model: Any) -> OwnPlan:
    """The plan in `plans` for this model's type; an empty one if there is none."""
    return OWN_PLANS.get(model.config.model_type, OwnPlan({}))


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


def plan_shards(model: Any, tp_size: int, vocab_rows: int) -> dict[str, ShardSpec]:
    """A `ShardSpec` for every sharded parameter, by Hugging Face parameter name; replicated ones are absent.

    vocab_rows: rows of the vocabulary per rank, padding included (`VocabShard.rows`). Embedding and head have a
    spec at any tp_size, also 1, because of that padding. A tied weight has an entry for both names.
    Raises ParallelError when the model cannot be sharded over tp_size ranks.
    """
    embedding, head = vocabulary_modules(model)
    specs: dict[str, ShardSpec] = {}
    for name in (embedding, head):
        for key, param in model.get_submodule(name).named_parameters(recurse=False):
            specs[f"{name}.{key}"] = padded_spec(0, param.shape[0], tp_size, vocab_rows)
    if tp_size > 1:
        plan = read_plan(model)
        for block in plan.blocks:
            specs.update(block_specs(model, block, tp_size))
        for name in plan.gathered:
            module = model.get_submodule(name)
            specs.update(column_specs(name, module, even_spec(0, features(module)[1], tp_size)))
        for name in plan.split:
            module = model.get_submodule(name)
            specs.update(row_specs(name, module, even_spec(0, features(module)[0], tp_size)))
        specs.update(expert_specs(model, tp_size))
    return specs


def _styles_by_module(model: Any) -> dict[str, str]:
    """Module name -> style, wildcards of the plan expanded, in the model's own order."""
    plan = {**(getattr(model, "tp_plan", None) or {}), **own_plan(model).styles}
    plan |= missing_styles(model, plan)
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
        # A plan may have an entry for a module and another for its weight; the module's is sufficient.
        parent = name.rpartition(".")[0]
        if parent in planned_modules and parent in targets:
            del styles[name]
    return styles


def _unsupported(model: Any, name: str, style: str) -> ParallelError:
    if style == EMBEDDING:
        return ParallelError(
            f"module {name!r} is planned as {style!r} but is not the input embedding\n"
            "  fix: set parallel.tp=1; this architecture has a second embedding that kdtrain cannot cut"
        )
    known = ", ".join((*_BLOCK_STYLES, *_ALONE, *_IGNORED))
    return ParallelError(
        f"tensor-parallel style {style!r} of module {name!r} ({type(model).__name__}) is not supported\n"
        f"  why: kdtrain cuts {known} and the head\n"
        "  fix: set parallel.tp=1, or use an architecture of the Llama, Qwen or GPT-NeoX kind"
    )


def _check_alone(model: Any, name: str, blocks: dict[str, dict[str, str]]) -> None:
    """Layers outside of blocks have whole gradients at input and output; inside a block these would be summed again."""
    parents = [parent for parent in blocks if name.startswith(parent + ".")]
    if parents:
        raise ParallelError(
            f"module {name!r} is planned as {GATHERED!r} or {SPLIT_INPUT!r} in the sharded block {parents[0]!r}\n"
            "  why: its whole gradient would be summed over the ranks by the block\n"
            "  fix: set parallel.tp=1 for this architecture"
        )
    _check_class(model, name)


def _check_class(model: Any, name: str) -> None:
    if not can_cut(model.get_submodule(name)):
        raise ParallelError(
            f"module {name!r} is a {type(model.get_submodule(name)).__name__}; only torch.nn.Linear and Conv1D can be "
            "cut\n  fix: set parallel.tp=1 for this architecture"
        )


def _block(model: Any, parent: str, children: dict[str, str]) -> Block:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    columns = {name: style for name, style in children.items() if style in _COLUMNS and name not in parameters}
    rows = [name for name, style in children.items() if style == ROWWISE]
    latent = tuple(name for name, style in children.items() if style == LATENT)
    module = model.get_submodule(parent)
    if not columns or len(rows) != 1:
        raise ParallelError(
            f"block {parent!r} ({type(module).__name__}) has {len(columns)} colwise and {len(rows)} rowwise modules\n"
            "  why: the input must go to column layers and the output must come from exactly one row layer\n"
            "  fix: set parallel.tp=1 for this architecture"
        )
    for name in (*columns, *rows):
        _check_class(model, name)
    copying = COPYING in columns.values()
    if not copying:
        _check_complete(module, parent, [*children, *(f"{parent}.{name}" for name in _BEFORE_LATENT if latent)])
    return Block(
        parent,
        columns,
        rows[0],
        partial_grad=tuple(name for name, style in children.items() if style == PARTIAL_GRAD),
        per_head=tuple(name for name in children if name in parameters),
        latent=latent,
        copies_inputs=copying or bool(latent),
    )


def _check_complete(module: Any, parent: str, known_names: list[str]) -> None:
    """Raises ParallelError for a parameter without a style: its gradient may be partial."""
    for name, _ in module.named_parameters():
        full = f"{parent}.{name}"
        if not any(full == known or full.startswith(known + ".") for known in known_names):
            raise ParallelError(
                f"parameter {full!r} is in a sharded block, but the model's plan has no style for it\n"
                "  why: its gradient would silently be partial on every rank\n"
                "  fix: set parallel.tp=1 for this architecture"
            )
