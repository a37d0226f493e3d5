"""Mixtures of experts over tensor-parallel ranks: every rank holds a share of every expert's intermediate features.

A stock module of experts packs its weights into 3-D parameters, [experts, rows, columns], and is called with tokens,
the indices of each token's experts and their weights. Router and norms stay replicated and see equal inputs, so all
ranks choose the same experts; each computes a part of every expert's sum over intermediate features, and one
all-reduce of the module's output, which is linear in it, completes them all. Nothing here imports transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from kdtrain.distributed.collectives import Group, copy_to_tp, reduce_from_tp
from kdtrain.errors import ParallelError
from kdtrain.parallel.cut import Cut, even_cut, fused_cut

EXPERTS = "moe_tp_experts"
"""Style that a model's plan gives to its modules of experts."""

SHARED_EXPERT = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
"""Styles of the children of an expert that every token passes."""

ALIGNED = 8
"""Features at whose multiples experts are cut where possible: grouped products on a GPU want rows of 16 bytes."""


def expert_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every module that packs experts into 3-D parameters."""
    for name, module in model.named_modules():
        down = module._parameters.get("down_proj")
        if down is not None and down.dim() == 3 and hasattr(module, "is_transposed"):
            yield name, module


def forgotten_styles(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Styles for modules of mixtures that their own `plan` leaves out, by module name: {} for other models.

    An expert that every token passes (Qwen2-MoE's, EXAONE-MoE's) is an ordinary MLP. A norm over one head (GLM-4-MoE's
    q_norm and k_norm) sees the heads of one rank, so its gradient is partial.
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


def expert_cuts(model: nn.Module, tp_size: int) -> dict[str, Cut]:
    """A `Cut` for every packed parameter of experts, by Hugging Face parameter name.

    Raises ParallelError when experts do more than their packed products and a gate, or have too few features.
    """
    cuts: dict[str, Cut] = {}
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
        inner = even_cut(columns, features, tp_size, ALIGNED if whole else 1)
        cuts[f"{name}.down_proj"] = inner
        if not module.has_gate:
            cuts[f"{name}.up_proj"] = Cut(rows, inner.pieces)
        elif module.is_concatenated:
            half = Cut(rows, inner.pieces)
            cuts[f"{name}.gate_up_proj"] = fused_cut((half, half))
        else:  # gate and up take turns, row by row
            cuts[f"{name}.gate_up_proj"] = Cut(rows, tuple((2 * start, 2 * stop) for start, stop in inner.pieces))
    return cuts


def sum_experts(module: nn.Module, group: Group) -> None:
    """Make a module of cut experts return the whole sum, and give its inputs whole gradients.

    Communicates: one all-reduce per call forward; backward one per input that needs a gradient (tokens, weights).
    """

    def whole(value: Any) -> Any:
        return copy_to_tp(value, group) if isinstance(value, Tensor) and value.is_floating_point() else value

    def copy_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(whole, args)), {key: whole(value) for key, value in kwargs.items()}

    def sum_out(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
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
