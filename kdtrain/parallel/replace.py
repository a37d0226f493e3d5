"""Swap the layers that a plan names for this rank's pieces, and mark and hook their parameters.

Does not communicate and works on any device, meta included.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdtrain.distributed.collectives import Move, reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ParallelError
from kdtrain.parallel.blocks import Block, Heads, block_heads, features, is_conv1d
from kdtrain.parallel.cut import Cut
from kdtrain.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    enter_block,
    sum_gradient_over_tp,
)
from kdtrain.parallel.pieces import place_piece, split_tensor
from kdtrain.parallel.plan import TpPlan, own_plan
from kdtrain.parallel.plans import HEADS, KV_HEADS
from kdtrain.parallel.variants import (
    ColumnParallelConv1D,
    CopyingColumnLinear,
    GatheredColumnLinear,
    LatentLinear,
    RowParallelConv1D,
    SplitInputRowLinear,
)


def replace_layers(model: Any, plan: TpPlan, cuts: Mapping[str, Cut], mesh: Mesh, enter: Move, leave: Move) -> None:
    """Put this rank's layers in place of all that `plan` names, in place. Raises ParallelError.

    enter, leave: how activations pass into a block and out of it.
    """
    local = own_plan(model).local
    for block in plan.blocks:
        heads = block_heads(model, block, mesh.tp_size)
        _replace_block(model, block, cuts, mesh, enter, leave)
        if heads is not None:
            _localize(model.get_submodule(block.name), local, heads, mesh.tp_rank)
    for kind, names in ((GatheredColumnLinear, plan.gathered), (SplitInputRowLinear, plan.split)):
        for name in names:
            sizes = _sizes(cuts[f"{name}.weight"])
            _swap(model, name, kind(*_local_linear(model, name, cuts, mesh), mesh.tp_group, sizes))


def local_parameter(full: nn.Parameter, cut: Cut | None, mesh: Mesh) -> nn.Parameter:
    """This rank's piece of a parameter, marked; the parameter itself with cut None."""
    if cut is None:
        return full
    local = nn.Parameter(split_tensor(full.detach(), cut, mesh.tp_rank), requires_grad=full.requires_grad)
    _mark_sharded(local, mesh.tp_size > 1 and not cut.is_copy(mesh.tp_rank))
    if cut.shared:
        _mark_shared(local, cut, mesh)
    return local


def copy_marks(old: Tensor, new: Tensor, mesh: Mesh) -> None:
    """Give `new`, which takes the place of `old`, the same marks and hooks."""
    _mark_sharded(new, getattr(old, "tensor_model_parallel", False))
    if getattr(old, "partial_gradient", False):
        mark_partial(new, mesh)
    if (cut := getattr(old, "shared_cut", None)) is not None:
        _mark_shared(new, cut, mesh)


def _replace_block(model: Any, block: Block, cuts: Mapping[str, Cut], mesh: Mesh, enter: Move, leave: Move) -> None:
    for name in block.columns:
        pieces = _local_linear(model, name, cuts, mesh)
        if block.copies_inputs:
            column: nn.Module = CopyingColumnLinear(*pieces, mesh.tp_group)
        else:
            column = (ColumnParallelConv1D if _is_conv1d(model, name) else ColumnParallelLinear)(*pieces)
        _swap(model, name, column)
    kind = RowParallelConv1D if _is_conv1d(model, block.row) else RowParallelLinear
    _swap(model, block.row, kind(*_local_linear(model, block.row, cuts, mesh), mesh.tp_group, leave))
    for name in block.partial_grad:
        for param in model.get_submodule(name).parameters():
            mark_partial(param, mesh)
    for name in block.per_head:
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, local_parameter(model.get_parameter(name), cuts[name], mesh))
    for name in block.latent:
        linear = model.get_submodule(name)
        latent = features(linear)[1] - model.get_submodule(block.name).qk_rope_head_dim
        _swap(model, name, LatentLinear(linear.weight, linear.bias, mesh.tp_group, latent))
    if not block.copies_inputs:
        enter_block(model.get_submodule(block.name), mesh.tp_group, enter)


def _localize(module: Any, local: Mapping[str, str], heads: Heads, tp_rank: int) -> None:
    """Tell stock attention code that counts heads, instead of reading them from shapes, how many this rank has."""
    counts = [stop - start for start, stop in (heads.cut.query[tp_rank], heads.cut.key_value[tp_rank])]
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


def _sizes(cut: Cut) -> tuple[int, ...]:
    return tuple(cut.held_size(rank) for rank in range(cut.tp_size))


def _is_conv1d(model: Any, name: str) -> bool:
    return is_conv1d(model.get_submodule(name))


def _swap(model: Any, name: str, module: nn.Module) -> None:
    model.set_submodule(name, module)


def _local_linear(
    model: Any, name: str, cuts: Mapping[str, Cut], mesh: Mesh
) -> tuple[nn.Parameter, nn.Parameter | None]:
    linear = model.get_submodule(name)
    weight = local_parameter(linear.weight, cuts[f"{name}.weight"], mesh)
    if linear.bias is None:
        return weight, None
    return weight, local_parameter(linear.bias, cuts.get(f"{name}.bias"), mesh)


def _mark_sharded(param: Tensor, sharded: bool) -> None:
    if sharded:
        param.tensor_model_parallel = True  # type: ignore[attr-defined]


def mark_partial(param: Tensor, mesh: Mesh) -> None:
    """Have the gradient of a replicated parameter, of which each rank computes a share, summed over tp.

    At once if the parameter is real, else when one takes its place (`copy_marks`).
    """
    param.partial_gradient = True  # type: ignore[attr-defined]
    if not param.is_meta and param.requires_grad:
        sum_gradient_over_tp(param, mesh.tp_group)


def _mark_shared(param: Tensor, cut: Cut, mesh: Mesh) -> None:
    """Sum the gradients of ranks that hold the same piece, in float32.

    Communicates in backward: one all-reduce of the full shape. One collective of all ranks rather than one per group of
    sharers: ranks whose groups differ cannot disagree about their order, and the tensors (key and value projections
    with fewer heads than ranks) are small.
    """
    param.shared_cut = cut  # type: ignore[attr-defined]
    if param.is_meta or not param.requires_grad:
        return

    def whole(grad: Tensor) -> Tensor:
        wide = torch.promote_types(grad.dtype, torch.float32)
        full = torch.zeros(cut.full_shape(tuple(grad.shape)), dtype=wide, device=grad.device)
        reduce_sum_(place_piece(full, grad, cut, mesh.tp_rank), mesh.tp_group)
        return split_tensor(full, cut, mesh.tp_rank).to(grad.dtype)

    param.register_hook(whole)  # type: ignore[no-untyped-call]
