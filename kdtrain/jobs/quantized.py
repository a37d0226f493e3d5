"""Quantisation of the teacher, and its divergence from the unquantised one on the run's own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdtrain.batch import Batch
from kdtrain.config.schema import RunConfig
from kdtrain.distributed.collectives import reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.jobs.build.models import Models
from kdtrain.log import LOGGER
from kdtrain.models.quantize import quantize_decoder_
from kdtrain.teacher.signal_measures import kl_sum


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
    kl = kl_sum(before, teacher.signal(batch), batch, models.layout)
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
