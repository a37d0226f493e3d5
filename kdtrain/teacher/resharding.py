"""Resharding between a student and a teacher with a larger tp: several replicas of the student share one teacher.

With tp_t = R tp_s the ranks of a teacher group hold R replicas of the student, each with its own batch. The teacher
runs all R batches together. The loss covers the tokens of all R replicas and is sharded over the teacher's tp_t ranks:
each rank takes 1/R of its rows of the student's head. Ranks that hold the same rows of the student's head thus compute
disjoint parts of that head's gradient, and ZeRO's sum over data ranks gives the whole gradient.

T tokens of one replica, D width of the student, v rows of the student's head on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.distributed.collectives import Group, gather_ranks, group_rank, group_size, transfer
from kdtrain.distributed.mesh import Mesh, own_group
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.documents import Documents, document_begins
from kdtrain.losses.types import LossParts


@dataclass(frozen=True, slots=True)
class TeacherResharding:
    """This rank's part of a teacher group.

    replicas: group of the R ranks that hold the same rows of the student's head; replica_rank: this rank's number in
    it. shard, group: how the loss is sharded. rows: which of the student's local head rows this rank takes.
    """

    num_replicas: int
    replica_rank: int
    replicas: Group
    shard: VocabShard
    group: Group
    rows: slice

    @classmethod
    def of(cls, student: Mesh, teacher: Mesh, shard: VocabShard) -> TeacherResharding | None:
        """None if both meshes have the same tp. Every rank must call it. Communicates: creates process groups.

        shard: the student's; its rows must divide by R. Raises ValueError otherwise, or if tp_t is not a multiple of
        tp_s.
        """
        if teacher.tp_size % student.tp_size:
            raise ValueError(f"the teacher's tp {teacher.tp_size} is not a multiple of the student's {student.tp_size}")
        num_replicas = teacher.tp_size // student.tp_size
        if num_replicas == 1:
            return None
        if shard.rows % num_replicas:
            raise ValueError(f"{shard.rows} rows of the student's head do not divide by {num_replicas} ranks")
        replica_rank, count = teacher.tp_rank // student.tp_size, shard.rows // num_replicas
        begin = shard.start + replica_rank * count
        return cls(
            num_replicas,
            replica_rank,
            _replicas(student, teacher),
            VocabShard(begin, begin + count, shard.vocab_size, teacher.tp_rank, teacher.tp_size),
            teacher.tp_group,
            slice(replica_rank * count, (replica_rank + 1) * count),
        )

    def gather(self, values: Tensor) -> Tensor:
        """[T, ...] -> [R T, ...], replica by replica; differentiable. One all-gather over `replicas`, none backward.

        The incoming gradient must be complete on every rank; each rank keeps that of its own tokens.
        """
        return transfer(values, self.replicas, _all_replicas, _own_replica)

    def gather_documents(self, batches: Sequence[Batch]) -> list[Documents | None]:
        """For each batch the documents of all replicas' sequences, [R B]; None for all if one of them is unknown here.

        Communicates: one all-gather of a byte per token for all batches together. Synchronises the device, so call it
        when no work is queued there.
        """
        if not batches or any(batch.documents is None for batch in batches):
            return [None] * len(batches)
        begins = [document_begins(batch.position_ids) for batch in batches]
        # The document lengths of the other replicas are on other hosts.
        gathered = gather_ranks(torch.cat([rows.flatten() for rows in begins]), self.replicas).cpu()
        parts = gathered.split([rows.numel() for rows in begins], dim=1)
        return [
            Documents.beginning(part.reshape(-1, rows.shape[1])).to(rows.device)
            for part, rows in zip(parts, begins, strict=True)
        ]

    def gather_batch(self, batch: Batch, documents: Documents | None) -> Batch:
        """The sequences of all replicas, [R B, S], with their `documents`. Communicates: one all-gather per field."""
        # All ranks of the teacher group run the sequences of all replicas.
        return replace(batch.map(lambda values: _all_replicas(values, self.replicas)), documents=documents)

    def head(self, head: HeadShard) -> HeadShard:
        """This rank's rows of the student's local head; differentiable, without communication."""
        bias = None if head.bias is None else head.bias[self.rows]
        return replace(head, weight=head.weight[self.rows], bias=bias)

    def local_parts(self, parts: LossParts) -> LossParts:
        """This replica's part of a loss over all R T tokens.

        Per-token fields: those of its own T tokens. loss: its value is 1/R of the whole, so that the sum over data
        ranks is the whole; its gradient is that of the whole, because replicas and ranks hold disjoint parts of it.
        """
        tokens = parts.ce.shape[0] // self.num_replicas
        mine = slice(self.replica_rank * tokens, (self.replica_rank + 1) * tokens)
        found: dict[str, Any] = {f.name: getattr(parts, f.name) for f in fields(parts)}
        found = {name: None if value is None else value[mine] for name, value in found.items() if name != "loss"}
        others = parts.loss.detach() * (1.0 - 1.0 / self.num_replicas)
        return LossParts(loss=parts.loss - others, **found)


def _all_replicas(values: Tensor, replicas: Group) -> Tensor:
    """[T, ...] -> [R T, ...]. Communicates: one all-gather."""
    # Each replica has only its own tokens; the teacher and the loss need those of all R.
    return gather_ranks(values, replicas).flatten(0, 1)


def _own_replica(values: Tensor, replicas: Group) -> Tensor:
    """[R T, ...] -> [T, ...]"""
    return values.unflatten(0, (group_size(replicas), -1))[group_rank(replicas)]


def _replicas(student: Mesh, teacher: Mesh) -> Group:
    """Group of the ranks of this teacher group that have this rank's tp_rank in the student's mesh."""
    return own_group(
        range(first + tp_rank, first + teacher.tp_size, student.tp_size)
        for first in range(0, student.world_size, teacher.tp_size)
        for tp_rank in range(student.tp_size)
    )
