"""One teacher cut over more ranks than the student: several replicas of the student share it.

With tp_t = R tp_s the ranks of a teacher group hold R replicas of the student, each with a batch of its own. The
teacher runs all R batches together. The loss sees the tokens of all R replicas and is cut over the teacher's tp_t
ranks: each rank takes 1/R of its rows of the student's head. Ranks whose student heads are copies of each other thus
hold disjoint parts of that head's gradient, and the sum over data ranks, which ZeRO takes anyway, is the whole.

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
class Spread:
    """This rank's part in a teacher group.

    replicas: group of the R ranks that hold the same rows of the student's head; place: this one's number among them.
    shard, group: how the loss is cut. rows: which of the student's local head rows are this rank's.
    """

    num_replicas: int
    place: int
    replicas: Group
    shard: VocabShard
    group: Group
    rows: slice

    @classmethod
    def of(cls, student: Mesh, teacher: Mesh, shard: VocabShard) -> Spread | None:
        """None if both meshes have the same tp. Every rank must call it. Communicates: creates process groups.

        shard: the student's; its rows must divide by R. Raises ValueError otherwise, or if tp_t is no multiple of tp_s.
        """
        if teacher.tp_size % student.tp_size:
            raise ValueError(f"the teacher's tp {teacher.tp_size} is no multiple of the student's {student.tp_size}")
        num_replicas = teacher.tp_size // student.tp_size
        if num_replicas == 1:
            return None
        if shard.rows % num_replicas:
            raise ValueError(f"{shard.rows} rows of the student's head cannot be dealt out to {num_replicas} ranks")
        place, count = teacher.tp_rank // student.tp_size, shard.rows // num_replicas
        begin = shard.start + place * count
        return cls(
            num_replicas,
            place,
            _replicas(student, teacher),
            VocabShard(begin, begin + count, shard.vocab_size, teacher.tp_rank, teacher.tp_size),
            teacher.tp_group,
            slice(place * count, (place + 1) * count),
        )

    def gather(self, values: Tensor) -> Tensor:
        """[T, ...] -> [R T, ...], replica by replica; differentiable. One all-gather over `replicas`, none backward.

        The gradient that comes back must be complete on every rank; each keeps that of its own tokens.
        """
        return transfer(values, self.replicas, _all_replicas, _own_replica)

    def gather_documents(self, batches: Sequence[Batch]) -> list[Documents | None]:
        """Of each batch those of all replicas' sequences, [R B]; None where this replica does not know its own.

        What other replicas know of theirs is on other hosts. Communicates: one all-gather of a byte per token, however
        many batches. Synchronises the device: to be called where nothing is queued on it.
        """
        if not batches or any(batch.documents is None for batch in batches):
            return [None] * len(batches)
        begins = [document_begins(batch.position_ids) for batch in batches]
        everyone = gather_ranks(torch.cat([rows.flatten() for rows in begins]), self.replicas).cpu()
        parts = everyone.split([rows.numel() for rows in begins], dim=1)
        return [
            Documents.beginning(part.reshape(-1, rows.shape[1])).to(rows.device)
            for part, rows in zip(parts, begins, strict=True)
        ]

    def gather_batch(self, batch: Batch, documents: Documents | None) -> Batch:
        """The sequences of all replicas, [R B, S], with their `documents`. One all-gather per field."""
        return replace(batch.map(lambda values: _all_replicas(values, self.replicas)), documents=documents)

    def head(self, head: HeadShard) -> HeadShard:
        """This rank's rows of the student's local head; differentiable, without communication."""
        bias = None if head.bias is None else head.bias[self.rows]
        return replace(head, weight=head.weight[self.rows], bias=bias)

    def own(self, parts: LossParts) -> LossParts:
        """What concerns this replica of a loss over all R T tokens.

        Per-token fields: its own T. loss: its value is 1/R of the whole, so that it adds up over data ranks; its
        gradient is that of the whole, of which each replica's tokens and each rank's head rows are a disjoint part.
        """
        tokens = parts.ce.shape[0] // self.num_replicas
        mine = slice(self.place * tokens, (self.place + 1) * tokens)
        found: dict[str, Any] = {f.name: getattr(parts, f.name) for f in fields(parts)}
        found = {name: None if value is None else value[mine] for name, value in found.items() if name != "loss"}
        others = parts.loss.detach() * (1.0 - 1.0 / self.num_replicas)
        return LossParts(loss=parts.loss - others, **found)


def _all_replicas(values: Tensor, replicas: Group) -> Tensor:
    """[T, ...] -> [R T, ...]"""
    return gather_ranks(values, replicas).flatten(0, 1)


def _own_replica(values: Tensor, replicas: Group) -> Tensor:
    """[R T, ...] -> [T, ...]"""
    return values.unflatten(0, (group_size(replicas), -1))[group_rank(replicas)]


def _replicas(student: Mesh, teacher: Mesh) -> Group:
    """The group of this rank: with its place in the student's tp, in every replica of the teacher's group."""
    return own_group(
        range(first + tp_rank, first + teacher.tp_size, student.tp_size)
        for first in range(0, student.world_size, teacher.tp_size)
        for tp_rank in range(student.tp_size)
    )
