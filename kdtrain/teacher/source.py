"""The interface of whatever knows a teacher's signal: a running teacher here or elsewhere, later a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kdtrain.batch import Batch, BatchSource
from kdtrain.teacher.signal import TeacherSignal


class SignalSource(Protocol):
    """Gives the teacher's signal of micro-batches."""

    @property
    def kind(self) -> str:
        """Of all its signals, a row of `losses.matrix.TARGETS`."""

    def check(self, batches: BatchSource) -> None:
        """Compare what the signals were made from with `batches`; called on every rank before the first step.

        Raises StoreMismatch naming both values, on all ranks alike.
        """

    def prefetch(self, micro_batches: Sequence[Batch]) -> None:
        """Announce all micro-batches of a step; called before `signal` of the first of them."""

    def signal(self, batch: Batch) -> TeacherSignal:
        """The teacher's signal of a micro-batch, announced or not."""
