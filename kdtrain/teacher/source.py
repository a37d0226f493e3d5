"""Where a teacher's signal comes from, as objectives and validation see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kdtrain.batch import Batch
from kdtrain.teacher.signal import DenseSignal


class TeacherSource(Protocol):
    """Where the teacher's distribution comes from."""

    def begin_step(self, micro_batches: Sequence[Batch]) -> None:
        """Told of all micro-batches of a step before the first of them."""

    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's view of a micro-batch."""
