"""Cut a stock Hugging Face model in place, from outside, and put state dicts together again.

Does not communicate and works on any device, meta included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdtrain.dist.collectives import copy_to_tp, gather_tokens, reduce_from_tp, scatter_tokens
from kdtrain.dist.mesh import Mesh
from kdtrain.dist.vocab import VocabShard
from kdtrain.errors import ParallelError
from kdtrain.parallel.cut import Cut
from kdtrain.parallel.experts import PackedCut, expert_modules, sum_experts
from kdtrain.parallel.layers import (
    ColumnParallelLinear,
    LmHead,
    RowParallelLinear,
    VocabParallelEmbedding,
    enter_block,
    sum_gradient_over_tp,
)
from kdtrain.parallel.plan import plan_cuts, read_plan, vocabulary_modules
from kdtrain.parallel.sequence import divide_layers, token_wise_parameters


def shard_model(model: Any, mesh: Mesh, shard: VocabShard | None = None, *, sequence: bool = False) -> Any:
    """Replace the embedding and the head, and at tp > 1 every layer the model's plan names, by this rank's piece.

    model: a stock causal language model with all its rows; changed in place and returned. shard: this rank's
    vocabulary rows; by default the model's own rows cut over the mesh. Sharded parameters are marked
    `tensor_model_parallel` (DeepSpeed's gradient norm reads it; forgetting it would be silent). Replicated parameters
    with partial gradients get the hook that sums them, now or, from meta, in `materialize_parameter`. Tied weights
    stay one parameter. sequence: divide activations between blocks by token (`kdtrain.parallel.sequence`); does
    nothing at tp 1. Raises ParallelError when the model cannot be cut.
    """
    if shard is None:
        head = model.get_submodule(vocabulary_modules(model)[1])
        shard = VocabShard.of(head.weight.shape[0], mesh.tp_rank, mesh.tp_size)
    cuts = plan_cuts(model, mesh.tp_size, shard.rows)
    blocks = read_plan(model).blocks if mesh.tp_size > 1 else ()
    sequence = sequence and mesh.tp_size > 1
    by_token = token_wise_parameters(model, blocks) if sequence else []
    enter, leave = (gather_tokens, scatter_tokens) if sequence else (copy_to_tp, reduce_from_tp)
    _replace_vocabulary(model, cuts, mesh, shard)
    for block in blocks:
        for name in block.columns:
            model.set_submodule(name, ColumnParallelLinear(*_local_linear(model, name, cuts, mesh)))
        row = RowParallelLinear(*_local_linear(model, block.row, cuts, mesh), mesh.tp_group, leave)
        model.set_submodule(block.row, row)
        for name in block.partial_grad:
            for param in model.get_submodule(name).parameters():
                _mark_partial(param, mesh)
        enter_block(model.get_submodule(block.name), mesh.tp_group, enter)
    if mesh.tp_size > 1:
        for name, experts in expert_modules(model):
            for key, param in list(experts.named_parameters(recurse=False)):
                setattr(experts, key, _local_parameter(param, cuts[f"{name}.{key}"], mesh))
            sum_experts(experts, mesh.tp_group)
    if sequence:
        divide_layers(model, blocks, mesh.tp_group)
        for name in by_token:
            _mark_partial(model.get_parameter(name), mesh)
    return model


def materialize_parameter(model: nn.Module, name: str, value: Tensor, mesh: Mesh) -> None:
    """Put `value` where the parameter `name` is (on meta), under all names it is tied to, with marks and hooks kept."""
    old = model.get_parameter(name)
    if old.shape != value.shape:
        raise ValueError(f"{name} has shape {tuple(old.shape)} on this rank, got {tuple(value.shape)}")
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    _mark_sharded(new, getattr(old, "tensor_model_parallel", False))
    if getattr(old, "partial_gradient", False):
        _mark_partial(new, mesh)
    for tied_name, param in list(model.named_parameters(remove_duplicate=False)):
        if param is old:
            owner, _, key = tied_name.rpartition(".")
            setattr(model.get_submodule(owner), key, new)


def split_tensor(full: Tensor, cut: Cut | None, tp_rank: int) -> Tensor:
    """This rank's piece as its own contiguous tensor, padded with zeros where the cut says so; None: all of it."""
    if cut is None:
        return full.clone(memory_format=torch.contiguous_format)
    if isinstance(cut, PackedCut):
        return cut.split(full, tp_rank)
    start, stop = cut.pieces[tp_rank]
    return pad_piece(full.narrow(cut.dim, start, stop - start), cut)


def pad_piece(piece: Tensor, cut: Cut) -> Tensor:
    """A contiguous copy of `piece`, filled up with zeros to the cut's local size."""
    size = piece.shape[cut.dim] if cut.padded is None else cut.padded
    local = piece.new_zeros((*piece.shape[: cut.dim], size, *piece.shape[cut.dim + 1 :]))
    local.narrow(cut.dim, 0, piece.shape[cut.dim]).copy_(piece)
    return local


def merge_tensors(pieces: Sequence[Tensor], cut: Cut | None) -> Tensor:
    """The full tensor from every tp rank's piece, padding dropped. With cut None the first piece stands for all."""
    if cut is None:
        return pieces[0]
    if isinstance(cut, PackedCut):
        return cut.merge(pieces)
    parts = [
        piece.narrow(cut.dim, 0, stop - start)
        for piece, (start, stop) in zip(pieces, cut.pieces, strict=True)
        if stop > start
    ]
    return torch.cat(parts, cut.dim)


def split_state_dict(full: Mapping[str, Tensor], cuts: Mapping[str, Cut], tp_rank: int) -> dict[str, Tensor]:
    """Every tensor of `full` as this rank holds it; names without a cut are replicated."""
    return {name: split_tensor(tensor, cuts.get(name), tp_rank) for name, tensor in full.items()}


def merge_state_dict(shards: Sequence[Mapping[str, Tensor]], cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
    """The inverse of `split_state_dict`: one state dict per tp rank, in rank order, to the full one.

    Raises ValueError when the ranks disagree about names.
    """
    names = list(shards[0])
    for rank, state in enumerate(shards):
        if set(state) != set(names):
            raise ValueError(f"tp rank {rank} and tp rank 0 differ in names: {sorted(set(state) ^ set(names))[:5]}")
    return {name: merge_tensors([state[name] for state in shards], cuts.get(name)) for name in names}


def _replace_vocabulary(model: Any, cuts: Mapping[str, Cut], mesh: Mesh, shard: VocabShard) -> None:
    embedding_name, head_name = vocabulary_modules(model)
    embedding, head = model.get_submodule(embedding_name), model.get_submodule(head_name)
    weight = _local_parameter(embedding.weight, cuts[f"{embedding_name}.weight"], mesh)
    tied = head.weight is embedding.weight
    head_weight = weight if tied else _local_parameter(head.weight, cuts[f"{head_name}.weight"], mesh)
    bias = getattr(head, "bias", None)
    head_bias = None if bias is None else _local_parameter(bias, cuts[f"{head_name}.bias"], mesh)
    scale, softcap = head_scaling(model.config)
    model.set_submodule(
        embedding_name,
        VocabParallelEmbedding(
            weight, shard, mesh.tp_group, padding_idx=embedding.padding_idx, scale=_embedding_scale(embedding)
        ),
    )
    model.set_submodule(head_name, LmHead(head_weight, head_bias, shard, logit_scale=scale, softcap=softcap))


def head_scaling(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) of a Hugging Face config: Cohere multiplies logits, Granite divides, Gemma caps.

    Raises ParallelError for a setting that looks like a further change of the logits: ignoring it would be silent.
    """
    known = {"logit_scale", "logits_scaling", "final_logit_softcapping"}
    for key, value in vars(config).items():
        suspicious = re.search(r"(logit|lm_head).*(scal|mult|cap)", key) and not key.startswith("attn")
        if suspicious and key not in known and value not in (None, 1.0):
            raise ParallelError(
                f"config.json sets {key} = {value}, which kdtrain does not know\n"
                "  why: the logits of this architecture are not hidden_states @ lm_head\n"
                "  fix: use an architecture of the Llama, Qwen, GPT-NeoX, Gemma, Cohere or Granite kind"
            )
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return float(scale), None if softcap is None else float(softcap)


def _embedding_scale(embedding: Any) -> float | None:
    if type(embedding) is nn.Embedding:
        if embedding.max_norm is not None:
            raise ParallelError("an embedding with max_norm cannot be cut by rows")
        return None
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    if not isinstance(embedding, nn.Embedding) or scale is None:
        raise ParallelError(
            f"the input embedding is a {type(embedding).__name__}, whose forward kdtrain does not know\n"
            "  fix: use an architecture with a plain or a scaled torch.nn.Embedding"
        )
    return float(scale)


def _local_linear(
    model: Any, name: str, cuts: Mapping[str, Cut], mesh: Mesh
) -> tuple[nn.Parameter, nn.Parameter | None]:
    linear = model.get_submodule(name)
    weight = _local_parameter(linear.weight, cuts[f"{name}.weight"], mesh)
    if linear.bias is None:
        return weight, None
    return weight, _local_parameter(linear.bias, cuts.get(f"{name}.bias"), mesh)


def _local_parameter(full: nn.Parameter, cut: Cut | None, mesh: Mesh) -> nn.Parameter:
    if cut is None:
        return full
    local = nn.Parameter(split_tensor(full.detach(), cut, mesh.tp_rank), requires_grad=full.requires_grad)
    _mark_sharded(local, mesh.tp_size > 1)
    return local


def _mark_sharded(param: nn.Parameter, sharded: bool) -> None:
    if sharded:
        param.tensor_model_parallel = True  # type: ignore[attr-defined]


def _mark_partial(param: nn.Parameter, mesh: Mesh) -> None:
    param.partial_gradient = True  # type: ignore[attr-defined]
    if not param.is_meta and param.requires_grad:
        sum_gradient_over_tp(param, mesh.tp_group)
