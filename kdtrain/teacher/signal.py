"""Teacher signals: what a loss takes from a teacher about the tokens of a batch, in whatever way they were made.

T tokens of a replica of the student, R replicas that share a teacher, D student width, E teacher width, K kept ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from kdtrain.distributed.collectives import Group
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses.sparse_targets import target_kind
from kdtrain.losses.types import LossParts, SparseTarget
from kdtrain.teacher.resharding import TeacherResharding


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """How the student's head is sharded, the memory limit of its loss, and which row kernels compute it."""

    shard: VocabShard
    group: Group
    slab_bytes: int
    backend: str = "auto"


@dataclass(frozen=True, slots=True)
class DenseSignal:
    """The whole teacher distribution, as hidden states and the head that turns them into logits.

    Usually hidden_states is [T, E], equal on every rank of the student's tp group, and head is this rank's rows,
    sharded like the student's head. Where replicas of the student share a teacher, hidden_states is [R T, E] of all of
    them, equal on every rank of the teacher's group, and head is sharded over that group. The methods hide the
    difference; only functions of kdtrain.teacher call them. Neither tensor requires a gradient.
    """

    hidden_states: Tensor
    head: HeadShard
    _resharding: TeacherResharding | None = field(default=None, repr=False)

    kind: ClassVar[str] = "dense"
    """Row of `losses.matrix.TARGETS`."""

    def vocabulary(self, layout: HeadLayout) -> tuple[VocabShard, Group]:
        """The rows of the vocabulary that this rank takes in a loss, and the group that has them all."""
        if self._resharding is None:
            return layout.shard, layout.group
        return self._resharding.shard, self._resharding.group

    def gather(self, values: Tensor) -> Tensor:
        """Values of this replica's tokens [T, ...] -> those of all tokens of hidden_states; differentiable.

        Communicates one all-gather over the replicas, if there is more than one.
        """
        return values if self._resharding is None else self._resharding.gather(values)

    def student_rows(self, head: HeadShard) -> HeadShard:
        """The rows of `vocabulary` among the student's rows on this rank; differentiable, without communication."""
        return head if self._resharding is None else self._resharding.head(head)

    def local_parts(self, parts: LossParts) -> LossParts:
        """This replica's part of a loss over all tokens of hidden_states."""
        return parts if self._resharding is None else self._resharding.local_parts(parts)


@dataclass(frozen=True, slots=True)
class SparseSignal:
    """The teacher's probabilities of some ids per token, equal on every rank of the student's tp group.

    target: of this replica's T tokens. kind: row of `losses.matrix.TARGETS`: that of the target, or "conditional" to
    renormalise both models on its ids. temperature: at which the record was made, and the only one at which a
    divergence may use it. allow_biased: the run accepts divergences that are biased on this kind. Raises ValueError for
    a kind that the target is not.
    """

    target: SparseTarget
    kind: str
    temperature: float
    allow_biased: bool = False

    def __post_init__(self) -> None:
        kinds = (target_kind(self.target), "conditional")
        if self.kind not in kinds:
            raise ValueError(f"kind = {self.kind!r} of a sparse signal, but its target is {' or '.join(kinds)}")


TeacherSignal = DenseSignal | SparseSignal
"""Every signal; each function of one has a single `match` over them."""
