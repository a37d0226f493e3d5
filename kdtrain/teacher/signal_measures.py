"""What is measured of signals themselves, without a student: cross-entropies and the divergence between two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.losses import divergence_spec, linear_kd_loss
from kdtrain.losses.label_sets import cross_entropy_of_label_sets
from kdtrain.teacher.signal import DenseSignal, HeadLayout, SparseSignal, TeacherSignal


@torch.no_grad()
def nll_sums(signal: TeacherSignal, label_sets: Sequence[Tensor], mask: Tensor, layout: HeadLayout) -> list[Tensor]:
    """A teacher's cross-entropy on each of `label_sets`, weighted with `mask` (all [B, S]) and summed; 0-d float64.

    The logits are computed once for all sets. Replicated over tp, to be summed over the ranks with other tokens.
    Communicates as cross_entropy_of_label_sets and, where replicas share a teacher, one all-gather over them for the
    mask and for each set. Raises ValueError for a sparse signal.
    """
    match signal:
        case DenseSignal():
            shard, group = signal.vocabulary(layout)
            parts = cross_entropy_of_label_sets(
                signal.hidden_states,
                signal.head,
                [signal.gather(labels.reshape(-1)) for labels in label_sets],
                weight=signal.gather(mask.reshape(-1)),
                shard=shard,
                group=group,
                slab_bytes=layout.slab_bytes,
                backend=layout.backend,
            )
            return [signal.local_parts(part).loss.double() for part in parts]
        case SparseSignal():
            raise ValueError(
                f"the cross-entropy of a {signal.kind} signal on other labels is undefined: of ids outside its record "
                "it has no probability; measure a dense signal"
            )
        case _:
            assert_never(signal)


@torch.no_grad()
def kl_sum(one: TeacherSignal, other: TeacherSignal, batch: Batch, layout: HeadLayout) -> Tensor:
    """KL(one || other) of two signals of `batch` from one source, summed over its valid tokens; 0-d float64, nats.

    Streamed: no logits are stored. Replicated over tp, local to a data rank. Communicates as `signal_loss` does.
    Raises ValueError unless both are dense.
    """
    match one, other:
        case DenseSignal(), DenseSignal():
            shard, group = one.vocabulary(layout)
            weight = one.gather(batch.loss_mask.reshape(-1))
            parts = linear_kd_loss(
                other.hidden_states,
                other.head,
                one.hidden_states,
                one.head,
                one.gather(batch.labels.reshape(-1)),
                divergence=divergence_spec("forward_kl"),
                kd_weight=weight,
                ce_weight=torch.zeros_like(weight),
                shard=shard,
                group=group,
                slab_bytes=layout.slab_bytes,
                backend=layout.backend,
            )
            kd = one.local_parts(parts).kd
            assert kd is not None
            return kd.double().where(batch.loss_mask.reshape(-1) > 0, 0.0).sum()
        case _:
            raise ValueError(
                f"the KL between a {one.kind} and a {other.kind} signal is undefined: only dense signals have a "
                "probability of every id; compare two of them"
            )
