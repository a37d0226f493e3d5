"""Quantisation of the teacher, and its divergence from the unquantised one on the run's own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.config.schema import RunConfig
from kdtrain.distributed.collectives import reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.jobs.build.models import Models
from kdtrain.log import LOGGER
from kdtrain.losses import linear_kd_loss
from kdtrain.models.quantize import quantize_decoder_
from kdtrain.teacher.signal import DenseSignal
from kdtrain.teacher.signal_loss import HeadLayout


@dataclass(frozen=True, slots=True)
class QuantizationCost:
    """kl: KL(unquantised || quantised), nats per token, over num_tokens. bytes_share: quantised / unquantised bytes."""

    kl: float
    num_tokens: int
    bytes_share: float


def quantize_teacher(cfg: RunConfig, models: Models, batch: Batch, mesh: Mesh) -> QuantizationCost | None:
    """Quantise the teacher by teacher.quantize and log the cost; None without it.

    batch: any micro-batch of this rank, on which the teacher runs before and after. Every rank must call it, before the
    student's engine is built. Communicates over tp as quantisation and the loss do, and one all-reduce over the world;
    all ranks get the same numbers.
    """
    teacher, backbone, kind = models.teacher, models.teacher_backbone, cfg.teacher.quantize
    if kind is None or teacher is None or backbone is None:
        return None
    before = teacher.signal(batch)
    sizes = quantize_decoder_(backbone, kind)
    kl = divergence(before, teacher.signal(batch), batch, models.layout)
    table = torch.tensor([0.0, 0.0, *sizes], dtype=torch.float64, device=kl.device)
    table[0], table[1] = kl, batch.num_valid_tokens()
    # each rank measured its own tokens and holds its own part of the weights; tokens are counted once per tp rank
    total, count, old, new = reduce_sum_(table, mesh.world_group).tolist()
    cost = QuantizationCost(total / max(count, 1.0), int(count) // mesh.tp_size, new / old)
    LOGGER.info(
        "teacher  %s: KL to its %s self %.3g nats/token over %d tokens, weights %.2f of the bytes",
        kind,
        cfg.teacher.dtype,
        cost.kl,
        cost.num_tokens,
        cost.bytes_share,
    )
    return cost


@torch.no_grad()
def divergence(one: DenseSignal, other: DenseSignal, batch: Batch, layout: HeadLayout) -> Tensor:
    """KL(one || other) of two signals of `batch` with the same head, summed over its valid tokens; 0-d float64.

    Streamed: no logits are stored. Replicated over tp, local to a data rank. Communicates as linear_kd_loss.
    """
    resharding = one.resharding
    shard, group = (layout.shard, layout.group) if resharding is None else (resharding.shard, resharding.group)
    labels, weight = batch.labels.reshape(-1), batch.loss_mask.reshape(-1)
    if resharding is not None:
        labels, weight = resharding.gather(labels), resharding.gather(weight)
    parts = linear_kd_loss(
        other.hidden_states,
        other.head,
        one.hidden_states,
        one.head,
        labels,
        divergence="forward_kl",
        kd_weight=weight,
        ce_weight=torch.zeros_like(weight),
        shard=shard,
        group=group,
        slab_bytes=layout.slab_bytes,
        backend=layout.backend,
    )
    if resharding is not None:
        parts = resharding.local_parts(parts)
    assert parts.kd is not None
    valid = batch.loss_mask.reshape(-1) > 0
    return parts.kd.double().where(valid, 0.0).sum()
