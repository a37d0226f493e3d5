"""Shard a stock Hugging Face model in place, without changes to its code. `shard_tensors` merges state dicts.

Does not communicate and works on any device, meta included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdtrain.distributed.collectives import copy_to_tp, gather_tokens, reduce_from_tp, scatter_tokens
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.errors import ParallelError
from kdtrain.parallel.experts import expert_modules, sum_experts
from kdtrain.parallel.layers import LmHead, VocabParallelEmbedding
from kdtrain.parallel.plan import plan_shards, read_plan, vocabulary_modules
from kdtrain.parallel.replace import copy_marks, local_parameter, mark_partial, replace_layers
from kdtrain.parallel.sequence import divide_layers, token_wise_parameters
from kdtrain.parallel.shard_spec import ShardSpec


def shard_model(model: Any, mesh: Mesh, shard: VocabShard | None = None, *, sequence: bool = False) -> Any:
    """Replace the embedding and the head, and at tp > 1 every layer in the model's plan, by this rank's shard.

    model: a stock causal language model with all its rows; changed in place and returned. shard: this rank's
    vocabulary rows; by default the model's rows divided over the mesh. Sharded parameters are marked
    `tensor_model_parallel`: without the mark DeepSpeed's gradient norm would silently be wrong. Replicated parameters
    with partial gradients get the hook that sums them, now or, from meta, in `materialize_parameter`. Tied weights
    remain one parameter. sequence: divide activations between blocks by token (`kdtrain.parallel.sequence`); no effect
    at tp 1. Raises ParallelError when the model cannot be sharded.
    """
    if shard is None:
        head = model.get_submodule(vocabulary_modules(model)[1])
        shard = VocabShard.of(head.weight.shape[0], mesh.tp_rank, mesh.tp_size)
    specs = plan_shards(model, mesh.tp_size, shard.rows)
    _replace_vocabulary(model, specs, mesh, shard)
    if mesh.tp_size == 1:
        return model
    plan = read_plan(model)
    by_token = token_wise_parameters(model, plan) if sequence else []
    input_comm, output_comm = (gather_tokens, scatter_tokens) if sequence else (copy_to_tp, reduce_from_tp)
    replace_layers(model, plan, specs, mesh, input_comm, output_comm)
    for name, experts in expert_modules(model):
        for key, param in list(experts.named_parameters(recurse=False)):
            setattr(experts, key, local_parameter(param, specs[f"{name}.{key}"], mesh))
        sum_experts(experts, mesh.tp_group)
    if sequence:
        divide_layers(model, plan, mesh.tp_group)
        for name in by_token:
            mark_partial(model.get_parameter(name), mesh)
    return model


def materialize_parameter(model: nn.Module, name: str, value: Tensor, mesh: Mesh) -> None:
    """Replace the meta parameter `name`, under all names it is tied to, by `value`, with the same marks and hooks."""
    old = model.get_parameter(name)
    if old.shape != value.shape:
        raise ValueError(f"{name} has shape {tuple(old.shape)} on this rank, got {tuple(value.shape)}")
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    copy_marks(old, new, mesh)
    for tied_name, param in list(model.named_parameters(remove_duplicate=False)):
        if param is old:
            owner, _, key = tied_name.rpartition(".")
            setattr(model.get_submodule(owner), key, new)


def _replace_vocabulary(model: Any, specs: Mapping[str, ShardSpec], mesh: Mesh, shard: VocabShard) -> None:
    embedding_name, head_name = vocabulary_modules(model)
    embedding, head = model.get_submodule(embedding_name), model.get_submodule(head_name)
    weight = local_parameter(embedding.weight, specs[f"{embedding_name}.weight"], mesh)
    tied = head.weight is embedding.weight
    head_weight = weight if tied else local_parameter(head.weight, specs[f"{head_name}.weight"], mesh)
    bias = getattr(head, "bias", None)
    head_bias = None if bias is None else local_parameter(bias, specs[f"{head_name}.bias"], mesh)
    scale, softcap = head_scaling(model.config)
    model.set_submodule(
        embedding_name,
        VocabParallelEmbedding(
            weight,
            shard,
            mesh.tp_group,
            padding_idx=embedding.padding_idx,
            scale=_embedding_scale(embedding),
            rounds_scale=isinstance(getattr(embedding, "embed_scale", None), Tensor),  # otherwise it is a number
        ),
    )
    model.set_submodule(head_name, LmHead(head_weight, head_bias, shard, logit_scale=scale, softcap=softcap))


def head_scaling(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) of a Hugging Face config: Cohere multiplies logits, Granite divides, Gemma caps.

    Raises ParallelError for another setting that seems to change the logits, rather than ignore it silently.
    """
    known = {"logit_scale", "logits_scaling", "final_logit_softcapping"}
    for key, value in vars(config).items():
        suspicious = re.search(r"(logit|lm_head).*(scal|mult|cap)", key) and not key.startswith("attn")
        if suspicious and key not in known and value not in (None, 1.0):
            raise ParallelError(
                f"config.json sets {key} = {value}, which kdtrain does not support\n"
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
            raise ParallelError("an embedding with max_norm cannot be sharded by rows")
        return None
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    if not isinstance(embedding, nn.Embedding) or scale is None:
        raise ParallelError(
            f"the input embedding is a {type(embedding).__name__}, whose forward is unknown\n"
            "  fix: use an architecture with a plain or a scaled torch.nn.Embedding"
        )
    return float(scale)
