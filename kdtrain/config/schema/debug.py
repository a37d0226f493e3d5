"""Section debug: switches for finding faults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class DebugSection:
    """Switches for finding faults."""

    check_replicas: bool = False
    """Compare the micro-batches of all tp ranks, element for element, and the borders of cp ranks' parts, each step;
    slow."""
    deterministic: bool = False
    """Use only operations that give the same bits twice: slower, with more memory, and an operation that has no such
    form ends the run. Without it attention's backward on CUDA adds in an order that varies, so a resumed run differs
    in rounding; on the CPU it changes no number. It does not control the order in which NCCL adds."""
    self_check: bool = True
    """Before the first step: the teacher's cross-entropy on the labels must be below that on labels shifted by one
    position either way."""
