"""The interface of teachers for objectives and validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kdtrain.batch import Batch
from kdtrain.teacher.signal import DenseSignal


class TeacherSource(Protocol):
    """Gives the teacher's signal for micro-batches."""

    def begin_step(self, micro_batches: Sequence[Batch]) -> None:
        """Announce all micro-batches of a step; called before `signal` of the first of them."""

    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's signal for a micro-batch."""
