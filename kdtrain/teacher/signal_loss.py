"""The loss of a student's hidden states against a teacher's signal, by blocks of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kdtrain.distributed.collectives import Group
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import linear_kd_loss
from kdtrain.losses.types import LossParts
from kdtrain.teacher.signal import DenseSignal


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """How the student's head is sharded, the memory limit of its loss, and which row kernels compute it."""

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
    """`linear_kd_loss` against a dense signal, whether or not replicas of the student share the teacher.

    All [T, ...] are this replica's. settings: divergence, temperature and so on. Communicates as the loss does and,
    with resharding, one all-gather over the replicas for each of hidden, labels and weights.
    """
    resharding, shard, group = signal.resharding, layout.shard, layout.group
    if resharding is not None:
        hidden, head = resharding.gather(hidden), resharding.head(head)
        labels, kd_weight, ce_weight = (
            resharding.gather(labels),
            resharding.gather(kd_weight),
            resharding.gather(ce_weight),
        )
        z_weight = None if z_weight is None else resharding.gather(z_weight)
        shard, group = resharding.shard, resharding.group
    parts = linear_kd_loss(
        hidden,
        head,
        signal.hidden_states,
        signal.head,
        labels,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        z_weight=z_weight,
        shard=shard,
        group=group,
        slab_bytes=layout.slab_bytes,
        backend=layout.backend,
        **settings,
    )
    return parts if resharding is None else resharding.local_parts(parts)
