"""A frozen teacher on the same ranks as the student.

`plain`: every rank holds the whole teacher; the ranks of a tp group divide the sequences of a micro-batch and gather
the hidden states, so no forward pass is done twice. `tp`: the teacher is sharded like the student, or over a multiple
of its tp ranks (`resharding`), and all ranks of a group run all sequences. In both layouts ZeRO-3 may also shard the
teacher over data ranks (`kdtrain.engine.frozen`); it gathers the weights of each layer for every forward pass, so
`prefetch` then runs all micro-batches of a step in one pass. Alternatively the teacher runs one micro-batch ahead of
the student, on a second stream (`side_stream`). Each rank gets the hidden states of all tokens and only its own rows of
the teacher's head; the full-vocabulary distribution is never materialised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kdtrain.batch import Batch, BatchSource
from kdtrain.distributed.collectives import Group, gather_ranks, group_size
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.documents import Documents
from kdtrain.models.backbone import Backbone
from kdtrain.teacher.resharding import TeacherResharding
from kdtrain.teacher.side_stream import SideStream
from kdtrain.teacher.signal import DenseSignal

HiddenStates = Callable[[Batch], Tensor]
"""[B, S] sequences -> [B S, E]."""


@dataclass(slots=True, eq=False)
class _MicroBatch:
    """A micro-batch of the present step: its documents (of all replicas), and a function that gives its hidden states.

    Found by identity of the batch. It holds a reference to the batch because an id() may be reused by a later one.
    """

    batch: Batch
    documents: Documents | None
    result: Callable[[], Tensor] | None = None
    """None until the forward pass has been started."""


@dataclass(frozen=True, slots=True)
class Passes:
    """How the micro-batches of a step become forward passes of the teacher.

    together: `prefetch` runs all of them in one pass. side: the stream on which the next micro-batch runs while the
    student trains on the present one; the groups of the mesh and of the backbone must then be used by the teacher only.
    max_tokens: limit of one forward pass on a rank, but never less than a sequence; None: no limit.
    """

    together: bool = False
    side: SideStream | None = None
    max_tokens: int | None = None


class OnlineTeacher:
    """A `SignalSource` of `DenseSignal`s.

    backbone: the frozen model, whole or sharded over teacher_mesh. mesh, shard: the student's; the teacher's head must
    have been loaded with as many rows. teacher_mesh: a Mesh with the teacher's tp, `Mesh()` for a whole model. forward:
    computes its hidden states, by default the backbone itself. head: its rows, by default the backbone's. Every rank
    must construct it. Communicates: creates process groups, and gathers the head's rows if the two layouts differ.
    Raises ValueError, on all ranks alike, if the parts do not fit.
    """

    kind = "dense"

    def __init__(
        self,
        backbone: Backbone,
        mesh: Mesh,
        shard: VocabShard,
        teacher_mesh: Mesh,
        *,
        forward: HiddenStates | None = None,
        head: HeadShard | None = None,
        passes: Passes = Passes(),
    ) -> None:
        _check_frozen(backbone, mesh, shard, teacher_mesh)
        self.backbone = backbone.eval()
        self._forward = forward or backbone.hidden_states
        self._mesh = mesh
        self._divides_sequences = mesh.tp_size > 1 and teacher_mesh.tp_size == 1
        self._resharding = TeacherResharding.of(mesh, teacher_mesh, shard) if teacher_mesh.tp_size > 1 else None
        self._passes = passes
        self._step: list[_MicroBatch] = []
        rows = shard if self._resharding is None else self._resharding.shard
        self._head = _local_rows(head or backbone.lm_head_shard, rows, teacher_mesh, self._resharding)

    @property
    def gathers_over(self) -> Group:
        """The group over which ranks that divide the sequences gather hidden states; None if they do not."""
        return self._mesh.tp_group if self._divides_sequences else None

    def check(self, batches: BatchSource) -> None:
        """Nothing to compare: it computes its signals from the batches themselves."""

    def prefetch(self, micro_batches: Sequence[Batch]) -> None:
        """Run the teacher on all micro-batches of a step in one pass, or start the first of them on the side stream.

        Communicates where replicas share a teacher: one all-gather, which synchronises the device. Call it when no work
        is queued there, as the trainer does after its all-reduce of the step's state.
        """
        self._step.clear()
        if self._passes.together:
            self._run_together(micro_batches)
        elif self._passes.side is not None or self._resharding is not None:
            documents = self._documents(micro_batches)
            self._step = [_MicroBatch(*pair) for pair in zip(micro_batches, documents, strict=True)]
            self._start_next()

    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's signal for `batch`; with a side stream, also starts the next micro-batch of the step.

        Communicates over tp: nothing extra when the teacher is sharded like the student; one all-gather of [T/tp, E]
        when the ranks divide the sequences; one all-gather per field of the batch when replicas share a teacher, and
        for a batch that was not in `prefetch` one more, which synchronises the device.
        """
        known = next((each for each in self._step if each.batch is batch), None)
        if known is None:
            known = _MicroBatch(batch, self._documents([batch])[0])
        else:
            self._step.remove(known)
        hidden = self._hidden(self._gathered(known)) if known.result is None else known.result()
        if known.result is not None:
            self._start_next()
        return DenseSignal(hidden, self._head, self._resharding)

    def _run_together(self, micro_batches: Sequence[Batch]) -> None:
        if len({batch.input_ids.shape for batch in micro_batches}) != 1:
            return
        merged = Batch.cat(micro_batches)
        # [tokens of all micro-batches, E], with resharding replica by replica
        hidden = self._hidden(self._gathered(_MicroBatch(merged, self._documents([merged])[0])))
        num_replicas = 1 if self._resharding is None else self._resharding.num_replicas
        parts = hidden.unflatten(0, (num_replicas, len(micro_batches), -1)).transpose(0, 1)
        for batch, part in zip(micro_batches, parts, strict=True):
            self._step.append(_MicroBatch(batch, None, partial(part.flatten, 0, 1)))

    def _start_next(self) -> None:
        """Start the next micro-batch of the step on the side stream; nothing without a side stream."""
        waiting = next((each for each in self._step if each.result is None), None)
        side = self._passes.side
        if side is None or waiting is None:
            return
        whole = self._gathered(waiting)  # on the current stream: the loss uses the replicas' group as well
        waiting.result = side.start(lambda: self._hidden(whole), whole.memory())

    def _documents(self, batches: Sequence[Batch]) -> Sequence[Documents | None]:
        """For each batch the documents of all sequences of its forward pass, other replicas' included."""
        if self._resharding is None:
            return [batch.documents for batch in batches]
        return self._resharding.gather_documents(batches)

    def _gathered(self, one: _MicroBatch) -> Batch:
        return one.batch if self._resharding is None else self._resharding.gather_batch(one.batch, one.documents)

    @torch.no_grad()
    def _hidden(self, batch: Batch) -> Tensor:
        return self._divided_forward(batch) if self._divides_sequences else self._limited_forward(batch)

    def _limited_forward(self, batch: Batch) -> Tensor:
        """[T, E] in as few passes as the limit allows. All ranks make equally many: their batches have one shape."""
        parts = [self._forward(part) for part in batch.portions(self._passes.max_tokens)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _divided_forward(self, batch: Batch) -> Tensor:
        num_sequences, seq_len = batch.input_ids.shape
        share = -(-num_sequences // self._mesh.tp_size)
        # If the sequences do not divide evenly, the last ranks repeat the final one: the gather needs equal shapes.
        first = self._mesh.tp_rank * share
        rows = [min(row, num_sequences - 1) for row in range(first, first + share)]
        hidden = self._limited_forward(Batch.cat([batch.rows(row, row + 1) for row in rows]))
        # Each rank ran only its share of the sequences; the loss needs all tokens on every tp rank.
        gathered = gather_ranks(hidden, self._mesh.tp_group)
        return gathered.reshape(-1, hidden.shape[-1])[: num_sequences * seq_len]


def _check_frozen(backbone: Backbone, mesh: Mesh, shard: VocabShard, teacher_mesh: Mesh) -> None:
    if any(param.requires_grad for _, param in backbone.hf_parameters()):
        raise ValueError("the teacher has parameters that require a gradient; load it with trainable=False")
    if group_size(backbone.cp_group) != mesh.cp_size:
        raise ValueError(
            f"the teacher was loaded with cp {group_size(backbone.cp_group)}, the student's mesh has cp "
            f"{mesh.cp_size}; load it with a mesh of the same cp"
        )
    rows, teachers = shard.rows * mesh.tp_size, backbone.shard
    if (teachers.rows * teacher_mesh.tp_size, teachers.vocab_size) != (rows, shard.vocab_size):
        raise ValueError(
            f"the teacher's head has {teachers.rows * teacher_mesh.tp_size} rows for {teachers.vocab_size} tokens, the "
            f"student's {rows} for {shard.vocab_size}; load both with the same total_rows and vocab_size"
        )


def _local_rows(head: HeadShard, rows: VocabShard, mesh: Mesh, resharding: TeacherResharding | None) -> HeadShard:
    """The given rows of the teacher's head, from those that this rank holds as a rank of `mesh`.

    Communicates over tp where teacher and student differ in tp. All ranks take the same branch.
    """
    if mesh.tp_size > 1 and resharding is None:
        return head  # sharded like the student's

    def select(values: Tensor) -> Tensor:
        if mesh.tp_size > 1:
            # The rows that this rank needs are on other ranks: the loss shards the vocabulary in another order.
            values = gather_ranks(values, mesh.tp_group).flatten(0, 1)
        return values[rows.start : rows.stop].clone() if mesh.tp_size > 1 else values[rows.start : rows.stop]

    bias = None if head.bias is None else select(head.bias.detach())
    return HeadShard(select(head.weight.detach()), bias, head.logit_scale, head.softcap)
