"""Teacher signals: the inputs of a loss that come from a teacher. T tokens of a replica of the student, R replicas, E
teacher width."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdtrain.distributed.vocab import HeadShard
from kdtrain.teacher.resharding import TeacherResharding


@dataclass(frozen=True, slots=True)
class DenseSignal:
    """The whole teacher distribution, as hidden states and the head that turns them into logits.

    Without `resharding`: hidden_states [T, E], equal on every rank of the student's tp group; head: this rank's rows,
    sharded like the student's head. With it: hidden_states [R T, E] of all replicas that share the teacher, equal on
    every rank of the teacher's group; head: the rows of `resharding.shard`. Neither requires a gradient.
    """

    hidden_states: Tensor
    head: HeadShard
    resharding: TeacherResharding | None = None
