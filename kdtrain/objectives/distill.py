"""Distillation from a teacher's signal, mixed with cross-entropy on the data."""

from __future__ import annotations

from collections.abc import Sequence

from kdtrain_kernels.divergences import DIVERGENCES
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.config.schema import DistillObjective
from kdtrain.distributed.vocab import HeadShard
from kdtrain.losses import DivergenceSpec, LossParts, divergence_spec
from kdtrain.models.student import Student
from kdtrain.objectives.base import LossOutput, require_source, summed_metrics
from kdtrain.teacher.signal import HeadLayout
from kdtrain.teacher.signal_loss import LossWeights, signal_loss
from kdtrain.teacher.source import SignalSource


def divergence_of(settings: DistillObjective) -> DivergenceSpec:
    """The divergence that a section's settings name, with its parameters and temperature. Raises ValueError for an
    unknown name and for values outside their ranges."""
    row = DIVERGENCES.get(settings.divergence)  # None is refused below, with the names that there are
    parameters = {name: getattr(settings, name) for name in (row.parameters if row else ())}
    return divergence_spec(settings.divergence, temperature=settings.temperature, **parameters)


class Distill:
    """w tau^2 D(teacher, student) + (1 - w) CE(data) + z_loss lse^2, summed over valid tokens.

    Hinton et al. 2015 (arXiv 1503.02531) for the mix and tau^2; the divergences are in `losses/reference.py`.
    """

    def __init__(
        self,
        student: Student,
        source: SignalSource | None,
        settings: DistillObjective,
        layout: HeadLayout,
        *,
        z_loss: float = 0.0,
    ) -> None:
        self.student = student
        self._source = require_source(source, "distill")
        self._kd_weight = settings.kd_weight
        self._divergence = divergence_of(settings)
        self._layout = layout
        self._z_loss = z_loss

    def prefetch(self, micro_batches: Sequence[Batch]) -> None:
        """Announce them to the source, which may run them together."""
        self._source.prefetch(micro_batches)

    def __call__(self, batch: Batch, *, measure: bool = False) -> LossOutput:
        """Loss of one micro-batch; with `measure`, also entropies, KL at temperature 1, TVD and top-1 agreement."""
        signal = self._source.signal(batch)
        mask = batch.loss_mask.reshape(-1)
        z = mask * self._z_loss if self._z_loss else None
        weights = LossWeights(mask * self._kd_weight, mask * (1.0 - self._kd_weight), z)

        def head_fn(hidden: Tensor, head: HeadShard) -> LossParts:
            return signal_loss(hidden, head, signal, batch, weights, self._divergence, self._layout, measure=measure)

        parts = self.student(batch, head_fn)
        return LossOutput(parts.loss, summed_metrics(parts, mask, self._z_loss))
