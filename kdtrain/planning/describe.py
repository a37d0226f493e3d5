"""Lines of the console that describe a run before its first step: layout, loss, data."""

from __future__ import annotations

from kdtrain.config.schema import DataSection, ObjectiveSection, ObjectiveSettings, ParallelSection, TeacherSection


def mesh_line(parallel: ParallelSection, world_size: int) -> str:
    """How the student's ranks are divided; cp is named only if it is more than 1."""
    cp = f" x cp {parallel.cp}" if parallel.cp > 1 else ""
    dp = world_size // (parallel.tp * parallel.cp)
    return f"{world_size} ranks = dp {dp}{cp} x tp {parallel.tp}"


def dedicated_line(teachers: int, tp: int) -> str:
    """The ranks of `teachers` dedicated teachers of `tp` ranks each: "2 x tp 2 on 4 ranks of its own"."""
    ranks = teachers * tp
    return f"{teachers} x tp {tp} on {ranks} rank{'s' if ranks > 1 else ''} of its own"


def teacher_line(teacher: TeacherSection, tp: int) -> str:
    """The layout of a teacher on the student's ranks, cut over `tp` of them."""
    layout = f"tp {tp}" if teacher.layout == "tp" else "plain"
    zero = " x zero 3" if teacher.zero_stage == 3 else ""
    bits = "" if teacher.quantize is None else f", {teacher.quantize} weights"
    return layout + zero + (" in host memory" if teacher.offload else "") + bits


def loss_line(objective: ObjectiveSection) -> str:
    """The chosen objective with its weights."""
    chosen: ObjectiveSettings = getattr(objective, objective.name)
    return chosen.loss_line() + (f"; z-loss {objective.z_loss:g}" if objective.z_loss else "")


def data_line(data: DataSection, num_tokens: int, num_stores: int, dp_size: int) -> str:
    """How many tokens there are, and of how many sequences a step consists."""
    per_rank = data.tokens_per_step // (data.seq_len * dp_size)
    micro_batches = per_rank // data.sequences_per_micro_batch
    return (
        f"{num_tokens:,} tokens in {num_stores} stores; {data.tokens_per_step:,} tokens/step = {dp_size} dp x "
        f"{data.sequences_per_micro_batch} seq x {micro_batches} micro-batches x {data.seq_len}"
    )
