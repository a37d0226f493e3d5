"""The interface of an objective: a micro-batch in, a summed loss and summed metrics out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.losses.types import LossParts
from kdtrain.models.student import Student
from kdtrain.teacher.signal import HeadLayout
from kdtrain.teacher.source import SignalSource


@dataclass(frozen=True, slots=True)
class LossOutput:
    """loss_sum: 0-d, differentiable, summed over this micro-batch's valid tokens.

    metrics: name -> (sum over valid tokens, number of them), both 0-d tensors, replicated over tp, local to dp.
    """

    loss_sum: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


class Objective(Protocol):
    """A training objective. Holds the student; returns sums, which the trainer divides by the global token count."""

    def prefetch(self, micro_batches: Sequence[Batch]) -> None:
        """Called with all micro-batches of a step before the first of them; the teacher may start on them."""

    def __call__(self, batch: Batch, *, measure: bool = False) -> LossOutput:
        """Loss of one micro-batch; with `measure`, also the metrics that need another pass over the logits."""


class ObjectiveClass(Protocol):
    """How every objective is constructed, by `jobs.build.objective`.

    source: of the teacher's signals, None for an objective whose traits name no signal. settings: its own section of
    the configuration. z_loss: weight of the squared log-sum-exp.
    """

    def __call__(
        self, student: Student, source: SignalSource | None, settings: Any, layout: HeadLayout, *, z_loss: float = 0.0
    ) -> Objective:
        """The objective."""


def require_source(source: SignalSource | None, name: str) -> SignalSource:
    """The source of an objective that needs one. Raises ValueError without."""
    if source is None:
        raise ValueError(f"objective {name} needs a source of teacher signals, got None")
    return source


PER_TOKEN_METRICS = {
    "loss/ce": "ce",
    "loss/kd": "kd",
    "distill/teacher_nll": "teacher_ce",
    "distill/forward_kl": "forward_kl",
    "distill/teacher_entropy": "teacher_entropy",
    "distill/student_entropy": "student_entropy",
    "distill/tvd": "tvd",
    "distill/top1_agreement": "agreement",
}
"""Metric name -> field of LossParts whose mean it is."""


def summed_metrics(parts: LossParts, loss_mask: Tensor, z_loss: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts of every per-token metric that `parts` holds, and of loss/total. loss_mask: [T].

    A masked position contributes nothing even if its value is not finite. loss/z: the part of the z-loss.
    """
    valid = loss_mask > 0
    count = valid.sum()
    metrics = {"loss/total": (parts.loss.detach(), count)}
    for name, field in PER_TOKEN_METRICS.items():
        values = getattr(parts, field)
        if values is not None:
            metrics[name] = (values.double().where(valid, 0.0).sum(), count)
    if z_loss:
        metrics["loss/z"] = (z_loss * parts.lse.double().square().where(valid, 0.0).sum(), count)
    return metrics
