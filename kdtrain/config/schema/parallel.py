"""Section parallel: how ranks share the work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ParallelSection:
    """How ranks share the work. dp is the world size divided by tp and cp."""

    world_size: int | None = None
    """Ranks that the job must have, a dedicated teacher's included; with another number the run is refused. A launcher
    that finds no hostfile starts this node alone. `--check` without a launcher checks for this number. null: as many as
    are started."""
    tp: int = 1
    """Tensor-parallel ranks per replica of the student."""
    sequence: bool = False
    """Megatron sequence parallelism of the student: between attention and MLP blocks each tp rank keeps its share of
    the tokens. The same result from less activation memory, for as many bytes over the network; needs tp > 1."""
    cp: int = 1
    """Context-parallel ranks: they share the sequences of a micro-batch, each holding seq_len / cp consecutive tokens
    of every one, and share out the attention heads (Ulysses), in the student and in the teacher. The query heads on
    each rank must divide by cp. For ZeRO they count as data ranks."""
