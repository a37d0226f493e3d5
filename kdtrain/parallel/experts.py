"""Mixtures of experts over tensor-parallel ranks: every rank holds some intermediate features of every expert.

A stock module of experts packs its weights into 3-D parameters, [experts, rows, columns]; its inputs are tokens, the
indices of each token's experts and their weights. Router and norms are replicated and have equal inputs, so all ranks
choose the same experts. Each rank computes a partial sum over intermediate features for every expert; one all-reduce of
the module's output, which is linear in these sums, completes them. Nothing here imports transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from kdtrain.distributed.collectives import Group, copy_to_tp, reduce_from_tp
from kdtrain.errors import ParallelError
from kdtrain.parallel.shard_spec import ShardSpec, even_spec, fused_spec

EXPERTS = "moe_tp_experts"
"""Style of expert modules in a model's plan."""

SHARED_EXPERT = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
"""Styles of the children of a shared expert, which processes every token."""

ALIGNED = 8
"""Experts are divided at multiples of this where possible: grouped products on a GPU need rows of 16 bytes."""


def expert_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every module that packs experts into 3-D parameters."""
    for name, module in model.named_modules():
        down = module._parameters.get("down_proj")
        if down is not None and down.dim() == 3 and hasattr(module, "is_transposed"):
            yield name, module


def missing_styles(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Styles for modules of mixtures that are missing in their own `plan`, by module name; {} for other models.

    A shared expert (Qwen2-MoE, EXAONE-MoE) is an ordinary MLP. A norm over one head (q_norm and k_norm of GLM-4-MoE) is
    applied to this rank's heads only, so its gradient is partial.
    """
    found: dict[str, str] = {}
    if EXPERTS not in plan.values():
        return found
    cuts_heads = any(key.endswith("self_attn.q_proj") and style == "colwise" for key, style in plan.items())
    for name, module in model.named_modules():
        if name.endswith((".shared_expert", ".shared_experts")):
            linear = [key for key, child in module.named_children() if type(child) is nn.Linear]
            found |= {f"{name}.{key}": SHARED_EXPERT[key] for key in linear if set(linear) == set(SHARED_EXPERT)}
        elif cuts_heads and name.endswith((".self_attn.q_norm", ".self_attn.k_norm")):
            attention = model.get_submodule(name.rpartition(".")[0])
            if tuple(module.weight.shape) == (getattr(attention, "head_dim", None),):
                found[name] = "replicated_with_grad_allreduce"
    return found


def expert_specs(model: nn.Module, tp_size: int) -> dict[str, ShardSpec]:
    """A `ShardSpec` for every packed parameter of experts, by Hugging Face parameter name.

    Raises ParallelError for experts with operations other than packed products and a gate, or too few features.
    """
    specs: dict[str, ShardSpec] = {}
    for name, module in expert_modules(model):
        _check_kind(name, module)
        rows, columns = (2, 1) if module.is_transposed else (1, 2)
        features = module.down_proj.shape[columns]
        if tp_size > features:
            raise ParallelError(
                f"teacher tensor parallelism over {tp_size} ranks is more than the {features} intermediate features "
                f"of an expert of {name!r}\n  fix: set teacher.tp to at most {features}"
            )
        whole = features % ALIGNED == 0 and features // ALIGNED >= tp_size
        inner = even_spec(columns, features, tp_size, ALIGNED if whole else 1)
        specs[f"{name}.down_proj"] = inner
        if not module.has_gate:
            specs[f"{name}.up_proj"] = ShardSpec(rows, inner.shards)
        elif module.is_concatenated:
            half = ShardSpec(rows, inner.shards)
            specs[f"{name}.gate_up_proj"] = fused_spec((half, half))
        else:  # gate and up rows are interleaved
            doubled = tuple((2 * start, 2 * stop) for start, stop in inner.shards)
            specs[f"{name}.gate_up_proj"] = ShardSpec(rows, doubled)
    return specs


def sum_experts(module: nn.Module, group: Group) -> None:
    """Hook a module of sharded experts so that its output is the whole sum and its inputs get whole gradients.

    Communicates: one all-reduce per call forward; backward one per input that needs a gradient (tokens, weights).
    """

    def copied(value: Any) -> Any:
        # The experts of each rank give a partial gradient of tokens and weights.
        return copy_to_tp(value, group) if isinstance(value, Tensor) and value.is_floating_point() else value

    def copy_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(copied, args)), {key: copied(value) for key, value in kwargs.items()}

    def sum_out(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # Each rank has the partial sum over its intermediate features.
        return reduce_from_tp(output, group)

    module.register_forward_pre_hook(copy_in, with_kwargs=True)
    module.register_forward_hook(sum_out)


def _check_kind(name: str, module: Any) -> None:
    known = {"down_proj", "gate_up_proj" if module.has_gate else "up_proj"}
    found = {key for key, _ in module.named_parameters()}
    if module.has_bias or module.has_post_expert_norm or found != known:
        raise ParallelError(
            f"experts {name!r} ({type(module).__name__}) have the parameters {sorted(found)}\n"
            "  why: a bias or a norm after each expert's product would be applied once per rank; kdtrain cuts "
            "packed gate, up and down matrices without either\n"
            "  fix: set teacher.layout=plain, with teacher.zero_stage=3 if the teacher does not fit"
        )
