"""What every objective is: micro-batch in, summed loss and summed metrics out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.distributed.collectives import Group
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import linear_kd_loss
from kdtrain.losses.types import LossParts
from kdtrain.teacher.signal import DenseSignal

R = TypeVar("R")


class Student(Protocol):
    """The trained model as an objective sees it: runs the decoder, then `head_fn` where the head's weight is whole."""

    def __call__(self, batch: Batch, head_fn: Callable[[Tensor, HeadShard], R]) -> R:
        """hidden_states [T, D] and this rank's head rows go to `head_fn`; its answer comes back."""


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """How the student's head is cut, how much memory its loss may use, and which row kernels compute it."""

    shard: VocabShard
    group: Group
    slab_bytes: int
    backend: str = "auto"


def dense_loss(
    hidden: Tensor,
    head: HeadShard,
    signal: DenseSignal,
    labels: Tensor,
    kd_weight: Tensor,
    ce_weight: Tensor,
    layout: HeadLayout,
    *,
    z_weight: Tensor | None = None,
    **settings: Any,
) -> LossParts:
    """`linear_kd_loss` against a teacher that runs along, whether or not replicas of the student share it.

    Everything [T, ...] is this replica's. settings: divergence, temperature and so on. Communicates as the loss does
    and, with a spread, one all-gather over the replicas for each of hidden, labels and weights.
    """
    spread, shard, group = signal.spread, layout.shard, layout.group
    if spread is not None:
        hidden, head = spread.gather(hidden), spread.head(head)
        labels, kd_weight, ce_weight = spread.gather(labels), spread.gather(kd_weight), spread.gather(ce_weight)
        z_weight = None if z_weight is None else spread.gather(z_weight)
        shard, group = spread.shard, spread.group
    parts = linear_kd_loss(
        hidden, head, signal.hidden_states, signal.head, labels, kd_weight=kd_weight, ce_weight=ce_weight,
        z_weight=z_weight, shard=shard, group=group, slab_bytes=layout.slab_bytes, backend=layout.backend, **settings,
    )  # fmt: skip
    return parts if spread is None else spread.own(parts)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """loss_sum: 0-d, differentiable, summed over this micro-batch's valid tokens.

    metrics: name -> (sum over valid tokens, number of them), both 0-d tensors, replicated over tp, local to dp.
    """

    loss_sum: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


class Objective(Protocol):
    """A way to learn. Holds the student; returns sums, never means."""

    def begin_step(self, micro_batches: Sequence[Batch]) -> None:
        """Told of all micro-batches of a step before the first of them."""

    def __call__(self, batch: Batch, *, measure: bool = False) -> LossOutput:
        """One micro-batch; with `measure`, also the metrics that cost an extra reading of the logits."""


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
"""Metric name -> field of LossParts that it is the mean of."""


def summed_metrics(parts: LossParts, loss_mask: Tensor, z_loss: float) -> dict[str, tuple[Tensor, Tensor]]:
    """The sums behind every per-token metric that `parts` carries, and loss/total. loss_mask [T].

    A masked position contributes nothing even if its value is not finite. loss/z: the part of a z_loss.
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
