"""Metrics of a student on held-out text, and of its distance to the teacher."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import HeadShard
from kdtrain.losses import divergence_spec, linear_cross_entropy
from kdtrain.losses.types import LossParts
from kdtrain.models.student import Student
from kdtrain.teacher.signal import HeadLayout
from kdtrain.teacher.signal_loss import LossWeights, signal_loss
from kdtrain.teacher.source import SignalSource
from kdtrain.telemetry.metrics import Metrics

EVAL_METRICS = {
    "eval/val_nll": "ce",
    "eval/kl_to_teacher": "forward_kl",
    "eval/teacher_nll": "teacher_ce",
    "eval/top1_agreement": "agreement",
    "eval/tvd": "tvd",
    "eval/teacher_entropy": "teacher_entropy",
    "eval/student_entropy": "student_entropy",
}
"""Name -> field of LossParts; means over valid tokens, nats per token or shares, all at temperature 1."""


class Validation:
    """Measures a student on fixed batches: nats per token, KL(teacher || student), top-1 agreement.

    Divergence and temperature do not depend on the training objective, so that runs can be compared.
    """

    def __init__(self, student: Student, source: SignalSource | None, layout: HeadLayout, mesh: Mesh) -> None:
        self._student = student
        self._source = source
        self._divergence = divergence_spec("forward_kl")
        self._layout = layout
        self._mesh = mesh

    @torch.no_grad()
    def run(self, batches: Iterable[Batch], device: torch.device) -> dict[str, float]:
        """Means over all valid tokens of `batches` on all data ranks.

        Communicates: the loss's statistics over tp, one all-reduce over dp and cp at the end. Every data rank must have
        the same number of batches.
        """
        metrics = Metrics(device=device, group=self._mesh.zero_group)
        for batch in batches:
            batch = batch.to(device)
            valid = batch.loss_mask.reshape(-1) > 0
            parts = self._measure(batch)
            for name, field in EVAL_METRICS.items():
                values = getattr(parts, field)
                if values is not None:
                    metrics.add(name, values.double().where(valid, 0.0).sum(), valid.sum())
        return metrics.reduce()

    def _measure(self, batch: Batch) -> LossParts:
        weight = batch.loss_mask.reshape(-1)
        weights = LossWeights(kd=weight, ce=weight)
        layout = self._layout
        signal = None if self._source is None else self._source.signal(batch)

        def head_fn(hidden: Tensor, head: HeadShard) -> LossParts:
            if signal is None:
                return linear_cross_entropy(
                    hidden,
                    head,
                    batch.labels.reshape(-1),
                    weight=weight,
                    shard=layout.shard,
                    group=layout.group,
                    slab_bytes=layout.slab_bytes,
                    backend=layout.backend,
                )
            return signal_loss(hidden, head, signal, batch, weights, self._divergence, layout, measure=True)

        return self._student(batch, head_fn)
