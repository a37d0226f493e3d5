"""Where ZeRO keeps this rank's part of the float32 weights and of AdamW's moments.

Reads DeepSpeed's own records (0.19.8) of which rank owns which elements: `param._hp_mapping` for stages 1 and 2 (both
of its optimizers, with or without round-robin order), `grad_position` for stage 3. Saving and restoring communicate no
parameters; only the working copies are gathered, by DeepSpeed, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdtrain.engine.manifest import KINDS, ParameterEntry, damaged
from kdtrain.engine.slices import CheckpointReader, Fragment
from kdtrain.parallel.shard_spec import ShardSpec

if TYPE_CHECKING:
    from kdtrain.engine.zero import StudentEngine


@dataclass(frozen=True, slots=True)
class _Owned:
    """Flat elements [offset, offset + numel) of this tp rank's (padded) piece lie in `owner` from `begin` on.

    owner: the tensor that AdamW steps: a flat partition of many parameters, or at stage 0 the parameter itself.
    valid: elements that are neither a vocabulary's padding nor ZeRO's; padding is at the end of a piece.
    """

    name: str
    cut: ShardSpec | None
    owner: Tensor
    begin: int
    offset: int
    numel: int
    valid: int

    def part(self, owner: Tensor) -> Tensor:
        """The view of `owner`, or of a tensor of its shape, that belongs to this parameter."""
        return owner.detach().view(-1).narrow(0, self.begin, self.numel)


def local_fragments(engine: StudentEngine) -> Iterator[Fragment]:
    """The fragments that this rank writes: views, no copies. All ranks together cover every parameter exactly once.

    Replicated parameters are written by tp rank 0, pieces that ranks share by the first of them, and at stage 0
    everything by the first rank of ZeRO's group. Moments that do not exist yet (no step was made) are zeros. Does not
    communicate.
    """
    for owned in _owned_ranges(engine):
        if not _writes(engine, owned):
            continue
        state = engine.optimizer.state.get(owned.owner, {})
        tensors = {"master": owned.owner, **{kind: state[kind] for kind in KINDS[1:] if kind in state}}
        for kind in KINDS:
            whole = tensors.get(kind)
            part = torch.zeros(owned.valid) if whole is None else owned.part(whole)[: owned.valid]
            yield Fragment(owned.name, kind, engine.mesh.tp_rank, owned.offset, part)


def local_adam_steps(engine: StudentEngine) -> dict[str, int]:
    """Name -> AdamW's step count, of the parameters that this rank writes a part of. Does not communicate."""
    steps = {}
    for owned in _owned_ranges(engine):
        if _writes(engine, owned):
            state = engine.optimizer.state.get(owned.owner, {})
            steps[owned.name] = int(state["step"]) if "step" in state else 0
    return steps


def restore_local(engine: StudentEngine, reader: CheckpointReader) -> None:
    """Fill this rank's float32 weights, moments (created if none exist yet) and step counts; padding becomes zero.

    Does not communicate; `refresh_parameters` must follow on all ranks. Raises CheckpointError.
    """
    steps: dict[int, tuple[int, str]] = {}
    for owned in _owned_ranges(engine):
        step = reader.manifest.parameters[owned.name].adam_step
        before, first = steps.setdefault(id(owned.owner), (step, owned.name))
        if before != step:
            raise damaged(
                reader.folder,
                f"{first} had made {before} AdamW steps, {owned.name} {step}; this layout has one count for both",
            )
        state = _adam_state(engine.optimizer, owned.owner)
        state["step"].fill_(step)
        for kind, target in zip(KINDS, (owned.owner, state["exp_avg"], state["exp_avg_sq"]), strict=True):
            stop = owned.offset + owned.numel
            values = reader.read_range(owned.name, kind, owned.cut, engine.mesh.tp_rank, owned.offset, stop)
            owned.part(target).copy_(values)


def refresh_parameters(engine: StudentEngine) -> None:
    """Make the working parameters (bfloat16 or float32) from the float32 weights, as the end of a step does.

    Communicates at stages 1 and 2: one all-gather of the working parameters over dp.
    """
    zero = engine.deepspeed.optimizer
    with torch.no_grad():
        if engine.zero_stage in (1, 2):
            zero.update_lp_params()  # all-gather: each rank has restored only its partition of the weights
        elif engine.zero_stage == 3:
            zero.parameter_offload.partition_all_parameters()  # whole copies are stale; forward gathers them anew
            flats = zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
            for working, master in flats:
                working.copy_(master)  # every ds_tensor is a view of a working buffer


def _writes(engine: StudentEngine, owned: _Owned) -> bool:
    tp_rank = engine.mesh.tp_rank
    if owned.valid <= 0 or (tp_rank != 0 if owned.cut is None else owned.cut.is_replica(tp_rank)):
        return False
    return engine.zero_stage > 0 or engine.mesh.zero_rank == 0


def _owned_ranges(engine: StudentEngine) -> Iterator[_Owned]:
    """In the model's order. The same ranges in every call, so that saving and restoring cannot disagree."""
    shapes = engine.backbone.full_shapes()
    for name, param in engine.backbone.hf_parameters():
        if not param.requires_grad:
            raise ValueError(f"{name} is frozen: kdtrain trains all parameters of a student")
        cut = engine.backbone.cuts.get(name)
        size = ParameterEntry(shapes[name], cut, 0).held(engine.mesh.tp_rank)
        place = _place(engine, param)
        if place is not None:
            owner, begin, offset, numel = place
            yield _Owned(name, cut, owner, begin, offset, numel, valid=min(offset + numel, size) - offset)


def _place(engine: StudentEngine, param: Any) -> tuple[Tensor, int, int, int] | None:
    """(owner, begin, offset, numel) of `_Owned`; None when another data rank has all of the parameter."""
    if engine.zero_stage == 0:
        return param, 0, 0, param.numel()
    if engine.zero_stage == 3:
        zero = engine.deepspeed.optimizer
        group, begin, numel = zero.grad_position[zero.get_param_id(param)]
        return zero.fp32_partitioned_groups_flat[group], begin, engine.mesh.zero_rank * numel, numel
    mapping = param._hp_mapping
    if mapping is None:
        return None
    owner = engine.optimizer.param_groups[mapping.param_group_index]["params"][0]
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return owner, here.start, there.start, here.numel


def _adam_state(optimizer: torch.optim.Optimizer, owner: Tensor) -> dict[str, Tensor]:
    """AdamW's state of `owner`, created as torch would at the first step: `step` is on the host unless fused."""
    state: dict[str, Tensor] = optimizer.state[owner]
    if not state:
        on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
        state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device if on_device else "cpu")
        for kind in KINDS[1:]:
            state[kind] = torch.zeros_like(owner, memory_format=torch.preserve_format, requires_grad=False)
    return state
