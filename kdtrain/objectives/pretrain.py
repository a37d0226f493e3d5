"""Plain next-token cross-entropy: the baseline of every distillation run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.config.schema import PretrainObjective
from kdtrain.distributed.vocab import HeadShard
from kdtrain.losses import linear_cross_entropy
from kdtrain.losses.types import LossParts
from kdtrain.models.student import Student
from kdtrain.objectives.base import LossOutput, summed_metrics
from kdtrain.teacher.signal import HeadLayout
from kdtrain.teacher.source import SignalSource


class Pretrain:
    """CE(data) + z_loss lse^2, summed over valid tokens. Reads neither `source` nor `settings`."""

    def __init__(
        self,
        student: Student,
        source: SignalSource | None,
        settings: PretrainObjective,
        layout: HeadLayout,
        *,
        z_loss: float = 0.0,
    ) -> None:
        self.student = student
        self._layout = layout
        self._z_loss = z_loss

    def prefetch(self, micro_batches: Sequence[Batch]) -> None:
        """Nothing to prepare."""

    def __call__(self, batch: Batch, *, measure: bool = False) -> LossOutput:
        """Loss of one micro-batch. `measure` adds nothing: the cross-entropy is always computed."""
        mask = batch.loss_mask.reshape(-1)
        layout = self._layout

        def head_fn(hidden: Tensor, head: HeadShard) -> LossParts:
            return linear_cross_entropy(
                hidden,
                head,
                batch.labels.reshape(-1),
                weight=mask,
                shard=layout.shard,
                group=layout.group,
                slab_bytes=layout.slab_bytes,
                backend=layout.backend,
                z_weight=mask * self._z_loss if self._z_loss else None,
            )

        parts = self.student(batch, head_fn)
        return LossOutput(parts.loss, summed_metrics(parts, mask, self._z_loss))
