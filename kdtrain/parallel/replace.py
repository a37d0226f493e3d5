"""Replace the layers of a plan by this rank's shards, and mark and hook their parameters.

Does not communicate and works on any device, meta included.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdtrain.distributed.collectives import Collective, reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ParallelError
from kdtrain.parallel.blocks import Block, Heads, block_heads, features, is_conv1d
from kdtrain.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    hook_block_input,
    sum_gradient_over_tp,
)
from kdtrain.parallel.plan import TpPlan, own_plan
from kdtrain.parallel.plans import HEADS, KV_HEADS
from kdtrain.parallel.shard_spec import ShardSpec
from kdtrain.parallel.shard_tensors import copy_shard_into, split_tensor
from kdtrain.parallel.variants import (
    ColumnParallelConv1D,
    CopyingColumnLinear,
    GatheredColumnLinear,
    LatentLinear,
    RowParallelConv1D,
    SplitInputRowLinear,
)


def replace_layers(
    model: Any,
    plan: TpPlan,
    specs: Mapping[str, ShardSpec],
    mesh: Mesh,
    input_comm: Collective,
    output_comm: Collective,
) -> None:
    """Replace all layers that `plan` names by this rank's shards, in place. Raises ParallelError.

    input_comm, output_comm: the collectives at the input and at the output of a block.
    """
    local = own_plan(model).local
    for block in plan.blocks:
        heads = block_heads(model, block, mesh.tp_size)
        _replace_block(model, block, specs, mesh, input_comm, output_comm)
        if heads is not None:
            _localize(model.get_submodule(block.name), local, heads, mesh.tp_rank)
    for kind, names in ((GatheredColumnLinear, plan.gathered), (SplitInputRowLinear, plan.split)):
        for name in names:
            sizes = _sizes(specs[f"{name}.weight"])
            _swap(model, name, kind(*_local_linear(model, name, specs, mesh), mesh.tp_group, sizes))


def local_parameter(full: nn.Parameter, spec: ShardSpec | None, mesh: Mesh) -> nn.Parameter:
    """This rank's shard of a parameter, marked as sharded; the parameter itself where spec is None."""
    if spec is None:
        return full
    local = nn.Parameter(split_tensor(full.detach(), spec, mesh.tp_rank), requires_grad=full.requires_grad)
    _mark_sharded(local, mesh.tp_size > 1 and not spec.is_replica(mesh.tp_rank))
    if spec.shared:
        _mark_shared(local, spec, mesh)
    return local


def copy_marks(old: Tensor, new: Tensor, mesh: Mesh) -> None:
    """Give `new`, which replaces `old`, the same marks and hooks."""
    _mark_sharded(new, getattr(old, "tensor_model_parallel", False))
    if getattr(old, "partial_gradient", False):
        mark_partial(new, mesh)
    if (spec := getattr(old, "shared_spec", None)) is not None:
        _mark_shared(new, spec, mesh)


def _replace_block(
    model: Any,
    block: Block,
    specs: Mapping[str, ShardSpec],
    mesh: Mesh,
    input_comm: Collective,
    output_comm: Collective,
) -> None:
    for name in block.columns:
        local = _local_linear(model, name, specs, mesh)
        if block.copies_inputs:
            column: nn.Module = CopyingColumnLinear(*local, mesh.tp_group)
        else:
            column = (ColumnParallelConv1D if _is_conv1d(model, name) else ColumnParallelLinear)(*local)
        _swap(model, name, column)
    kind = RowParallelConv1D if _is_conv1d(model, block.row) else RowParallelLinear
    _swap(model, block.row, kind(*_local_linear(model, block.row, specs, mesh), mesh.tp_group, output_comm))
    for name in block.partial_grad:
        for param in model.get_submodule(name).parameters():
            mark_partial(param, mesh)
    for name in block.per_head:
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, local_parameter(model.get_parameter(name), specs[name], mesh))
    for name in block.latent:
        linear = model.get_submodule(name)
        latent = features(linear)[1] - model.get_submodule(block.name).qk_rope_head_dim
        _swap(model, name, LatentLinear(linear.weight, linear.bias, mesh.tp_group, latent))
    if not block.copies_inputs:
        hook_block_input(model.get_submodule(block.name), mesh.tp_group, input_comm)


def _localize(module: Any, local: Mapping[str, str], heads: Heads, tp_rank: int) -> None:
    """Set this rank's head counts in stock attention code that does not infer them from shapes."""
    counts = [stop - start for start, stop in (heads.sharding.query[tp_rank], heads.sharding.key_value[tp_rank])]
    if hasattr(module, "num_key_value_groups"):
        module.num_key_value_groups = counts[0] // counts[1]
    for attribute, what in local.items():
        value = {HEADS: counts[0], KV_HEADS: counts[1]}.get(what, counts[0] * heads.head_dim)
        target, _, key = attribute.rpartition(".")
        if target:
            setattr(module, target, copy.copy(getattr(module, target)))
        owner = getattr(module, target) if target else module
        if not hasattr(owner, key):
            raise ParallelError(
                f"{type(module).__name__} has no {attribute}, which kdtrain's plan for it sets\n"
                "  why: this version of transformers names it otherwise\n  fix: set parallel.tp=1"
            )
        setattr(owner, key, value)


def _sizes(spec: ShardSpec) -> tuple[int, ...]:
    return tuple(spec.held_size(rank) for rank in range(spec.tp_size))


def _is_conv1d(model: Any, name: str) -> bool:
    return is_conv1d(model.get_submodule(name))


def _swap(model: Any, name: str, module: nn.Module) -> None:
    model.set_submodule(name, module)


def _local_linear(
    model: Any, name: str, specs: Mapping[str, ShardSpec], mesh: Mesh
) -> tuple[nn.Parameter, nn.Parameter | None]:
    linear = model.get_submodule(name)
    weight = local_parameter(linear.weight, specs[f"{name}.weight"], mesh)
    if linear.bias is None:
        return weight, None
    return weight, local_parameter(linear.bias, specs.get(f"{name}.bias"), mesh)


def _mark_sharded(param: Tensor, sharded: bool) -> None:
    if sharded:
        param.tensor_model_parallel = True  # type: ignore[attr-defined]


def mark_partial(param: Tensor, mesh: Mesh) -> None:
    """Mark a replicated parameter whose gradient is partial on each rank; a hook sums it over tp.

    The hook is registered now, or for a meta parameter when a real one replaces it (`copy_marks`).
    """
    param.partial_gradient = True  # type: ignore[attr-defined]
    if not param.is_meta and param.requires_grad:
        sum_gradient_over_tp(param, mesh.tp_group)


def _mark_shared(param: Tensor, spec: ShardSpec, mesh: Mesh) -> None:
    """Sum the gradients of ranks that hold the same shard, in float32.

    Communicates in backward: one all-reduce of the full shape over all tp ranks. Groups of only the ranks that hold the
    same shard could be used in different orders on different ranks; the tensors (key and value projections with fewer
    heads than ranks) are small.
    """
    param.shared_spec = spec  # type: ignore[attr-defined]
    if param.is_meta or not param.requires_grad:
        return

    def whole(grad: Tensor) -> Tensor:
        wide = torch.promote_types(grad.dtype, torch.float32)
        full = torch.zeros(spec.full_shape(tuple(grad.shape)), dtype=wide, device=grad.device)
        # Each rank has the gradient from its own query heads only; without the sum the copies would diverge.
        reduce_sum_(copy_shard_into(full, grad, spec, mesh.tp_rank), mesh.tp_group)
        return split_tensor(full, spec, mesh.tp_rank).to(grad.dtype)

    param.register_hook(whole)  # type: ignore[no-untyped-call]
