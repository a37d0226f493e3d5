"""The loss of a student's hidden states against a teacher's signal: the one passage from signals to losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.distributed.vocab import HeadShard
from kdtrain.losses import DivergenceSpec, LossParts, linear_kd_loss, linear_sparse_kd_loss
from kdtrain.teacher.signal import DenseSignal, HeadLayout, SparseSignal, TeacherSignal


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of a loss per token, each [T], constants: of the divergence, the cross-entropy and the squared lse."""

    kd: Tensor
    ce: Tensor
    z: Tensor | None = None


def signal_loss(
    hidden: Tensor,
    head: HeadShard,
    signal: TeacherSignal,
    batch: Batch,
    weights: LossWeights,
    divergence: DivergenceSpec,
    layout: HeadLayout,
    *,
    measure: bool = False,
) -> LossParts:
    """sum_t kd[t] temperature^2 D[t] + ce[t] CE[t] + z[t] lse[t]^2 against any signal of `batch`.

    hidden [T, D]: of this replica's tokens. head: this rank's rows of the student's head, by layout. divergence: D with
    its parameters and temperature. measure: also entropies, KL at temperature 1, TVD and top-1 agreement, which need a
    dense signal; a sparse one has too little for them and they stay None. Communicates as the loss of the signal's kind
    and, for a dense signal whose teacher is shared by replicas, one all-gather over them for each of hidden, labels and
    weights. Raises ValueError for a divergence that is not defined on the signal's kind (`losses.matrix`) and for a
    record that was made at another temperature than the divergence's, before anything is computed.
    """
    match signal:
        case DenseSignal():
            return _dense_loss(hidden, head, signal, batch, weights, divergence, layout, measure)
        case SparseSignal():
            _check_temperature(signal, divergence)
            return linear_sparse_kd_loss(
                hidden,
                head,
                signal.target,
                batch.labels.reshape(-1),
                divergence=divergence,
                kd_weight=weights.kd,
                ce_weight=weights.ce,
                z_weight=weights.z,
                shard=layout.shard,
                group=layout.group,
                slab_bytes=layout.slab_bytes,
                backend=layout.backend,
                renormalise_student=signal.kind == "conditional",
                allow_biased=signal.allow_biased,
            )
        case _:
            assert_never(signal)


def _dense_loss(
    hidden: Tensor,
    head: HeadShard,
    signal: DenseSignal,
    batch: Batch,
    weights: LossWeights,
    divergence: DivergenceSpec,
    layout: HeadLayout,
    measure: bool,
) -> LossParts:
    shard, group = signal.vocabulary(layout)
    parts = linear_kd_loss(
        signal.gather(hidden),
        signal.student_rows(head),
        signal.hidden_states,
        signal.head,
        signal.gather(batch.labels.reshape(-1)),
        divergence=divergence,
        kd_weight=signal.gather(weights.kd),
        ce_weight=signal.gather(weights.ce),
        z_weight=None if weights.z is None else signal.gather(weights.z),
        shard=shard,
        group=group,
        slab_bytes=layout.slab_bytes,
        backend=layout.backend,
        measure=measure,
    )
    return signal.local_parts(parts)


def _check_temperature(signal: SparseSignal, divergence: DivergenceSpec) -> None:
    if signal.temperature != divergence.temperature:
        raise ValueError(
            f"temperature = {divergence.temperature:g} of the divergence, but the signal's record was made at "
            f"{signal.temperature:g}: a record at another temperature is another distribution; use the record's"
        )
