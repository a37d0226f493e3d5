"""A frozen teacher on the same ranks as the student.

`plain`: every rank holds the whole teacher; the ranks of a tp group share out the sequences of a micro-batch and
gather the hidden states, so no forward pass is done twice. `tp`: the teacher is cut like the student, or over a
multiple of its tp ranks (`spread`), and all ranks of a group run all sequences together. Either may be sharded over
data ranks by ZeRO-3 besides (`kdtrain.engine.frozen`), which gathers the weights of a layer when they are needed: then
it pays to run all micro-batches of a step at once (`begin_step`). Or the teacher runs one micro-batch ahead of the
student, on a stream of its own (`side_stream`). Each rank gets the hidden states of all tokens and only its own rows of
the teacher's head: the full-vocabulary distribution exists nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.distributed.collectives import Group, gather_ranks, group_size
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.documents import Documents
from kdtrain.models.backbone import Backbone
from kdtrain.teacher.side_stream import SideStream
from kdtrain.teacher.signal import DenseSignal
from kdtrain.teacher.spread import Spread

HiddenStates = Callable[[Batch], Tensor]
"""[B, S] sequences -> [B S, E]."""


@dataclass(slots=True, eq=False)
class _MicroBatch:
    """One of the step under way: its documents, replicas' included, and the answer's call once the teacher works on it.

    Found by the batch itself, which it keeps: an id alone could be that of a later batch.
    """

    batch: Batch
    documents: Documents | None
    finish: Callable[[], Tensor] | None = None


class OnlineTeacher:
    """Turns a micro-batch into a `DenseSignal`.

    backbone: the frozen model, whole or cut over teacher_mesh. mesh, shard: the student's; the teacher's head must have
    been loaded with as many rows. teacher_mesh: a Mesh of its own tp, `Mesh()` for a whole model. forward: how its
    hidden states are computed, by default by the backbone itself. together: whether `begin_step` runs a step's
    micro-batches at once. side: where to run the next micro-batch while the student learns from the present one; the
    groups of mesh and those that the backbone was cut with must then be the teacher's alone. max_tokens: limit of one
    forward pass on a rank, but never less than a sequence; null: none. Every rank must construct it. Communicates:
    groups, and the head's rows if they must move. Raises ValueError, on all ranks alike, if the parts do not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        mesh: Mesh,
        shard: VocabShard,
        teacher_mesh: Mesh,
        *,
        forward: HiddenStates | None = None,
        head: HeadShard | None = None,
        together: bool = False,
        side: SideStream | None = None,
        max_tokens: int | None = None,
    ) -> None:
        _check_frozen(backbone, mesh, shard, teacher_mesh)
        self.backbone = backbone.eval()
        self._forward = forward or backbone.hidden_states
        self._mesh = mesh
        self._shares_sequences = mesh.tp_size > 1 and teacher_mesh.tp_size == 1
        self._spread = Spread.of(mesh, teacher_mesh, shard) if teacher_mesh.tp_size > 1 else None
        self._together = together
        self._side = side
        self._max_tokens = max_tokens
        self._step: list[_MicroBatch] = []
        wanted = shard if self._spread is None else self._spread.shard
        self._head = _local_rows(head or backbone.lm_head_shard, wanted, teacher_mesh, self._spread)

    @property
    def gathers_over(self) -> Group:
        """The group over which ranks that share out sequences gather hidden states; None if they do not."""
        return self._mesh.tp_group if self._shares_sequences else None

    def begin_step(self, micro_batches: Sequence[Batch]) -> None:
        """Run the teacher over all micro-batches of a step, if that is cheaper, or start on the first of them.

        Communicates where replicas share a teacher: one all-gather, which synchronises the device. To be called while
        nothing is queued on it, as a trainer does that has just agreed on the step.
        """
        self._step.clear()
        if self._together:
            self._run_together(micro_batches)
        elif self._side is not None or self._spread is not None:
            documents = self._documents(micro_batches)
            self._step = [_MicroBatch(*pair) for pair in zip(micro_batches, documents, strict=True)]
            self._start_next()

    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's view of `batch`; with a side stream, the next micro-batch of the step is then under way.

        Communicates over tp: nothing extra when the teacher is cut like the student; one all-gather of [T/tp, E]
        when the ranks share out the sequences; one all-gather per field of the batch when replicas share a teacher,
        and for a batch that `begin_step` was not given one more, which synchronises the device.
        """
        known = next((each for each in self._step if each.batch is batch), None)
        if known is None:
            known = _MicroBatch(batch, self._documents([batch])[0])
        else:
            self._step.remove(known)
        hidden = self._hidden(self._gathered(known)) if known.finish is None else known.finish()
        if known.finish is not None:
            self._start_next()
        return DenseSignal(hidden, self._head, self._spread)

    def _run_together(self, micro_batches: Sequence[Batch]) -> None:
        if len({batch.input_ids.shape for batch in micro_batches}) != 1:
            return
        merged = Batch.cat(micro_batches)
        # [tokens of all, E], or replica by replica the tokens of all
        hidden = self._hidden(self._gathered(_MicroBatch(merged, self._documents([merged])[0])))
        num_replicas = 1 if self._spread is None else self._spread.num_replicas
        parts = hidden.unflatten(0, (num_replicas, len(micro_batches), -1)).transpose(0, 1)
        for batch, part in zip(micro_batches, parts, strict=True):
            self._step.append(_MicroBatch(batch, None, partial(part.flatten, 0, 1)))

    def _start_next(self) -> None:
        """Start on the first micro-batch of the step that is not under way, on the side stream if there is one."""
        waiting = next((each for each in self._step if each.finish is None), None)
        if self._side is None or waiting is None:
            return
        whole = self._gathered(waiting)  # here, because replicas use their group in the loss, too
        waiting.finish = self._side.start(lambda: self._hidden(whole), whole.memory())

    def _documents(self, batches: Sequence[Batch]) -> Sequence[Documents | None]:
        """Of each batch those of all sequences that a forward pass takes with it."""
        if self._spread is None:
            return [batch.documents for batch in batches]
        return self._spread.gather_documents(batches)

    def _gathered(self, one: _MicroBatch) -> Batch:
        return one.batch if self._spread is None else self._spread.gather_batch(one.batch, one.documents)

    @torch.no_grad()
    def _hidden(self, batch: Batch) -> Tensor:
        return self._shared_forward(batch) if self._shares_sequences else self._limited_forward(batch)

    def _limited_forward(self, batch: Batch) -> Tensor:
        """[T, E] in as few passes as the limit allows; as many on all ranks, whose batches have one shape."""
        parts = [self._forward(part) for part in batch.portions(self._max_tokens)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _shared_forward(self, batch: Batch) -> Tensor:
        num_sequences, seq_len = batch.input_ids.shape
        share = -(-num_sequences // self._mesh.tp_size)
        # The last ranks repeat the final sequence when the shares do not come out even: equal shapes for the gather.
        first = self._mesh.tp_rank * share
        rows = [min(row, num_sequences - 1) for row in range(first, first + share)]
        hidden = self._limited_forward(Batch.cat([batch.rows(row, row + 1) for row in rows]))
        gathered = gather_ranks(hidden, self._mesh.tp_group)
        return gathered.reshape(-1, hidden.shape[-1])[: num_sequences * seq_len]


def _check_frozen(backbone: Backbone, mesh: Mesh, shard: VocabShard, teacher_mesh: Mesh) -> None:
    if any(param.requires_grad for _, param in backbone.hf_parameters()):
        raise ValueError("the teacher has parameters that require a gradient; load it with trainable=False")
    if group_size(backbone.cp_group) != mesh.cp_size:
        raise ValueError(
            f"the teacher takes sequences for shared by {group_size(backbone.cp_group)} ranks, the student by "
            f"{mesh.cp_size}; load it with a mesh of the same cp"
        )
    rows, teachers = shard.rows * mesh.tp_size, backbone.shard
    if (teachers.rows * teacher_mesh.tp_size, teachers.vocab_size) != (rows, shard.vocab_size):
        raise ValueError(
            f"the teacher's head has {teachers.rows * teacher_mesh.tp_size} rows for {teachers.vocab_size} tokens, the "
            f"student's {rows} for {shard.vocab_size}; load both with the same total_rows and vocab_size"
        )


def _local_rows(head: HeadShard, want: VocabShard, mesh: Mesh, spread: Spread | None) -> HeadShard:
    """The rows `want` of the teacher's head, of which this rank holds the part that belongs to its place in `mesh`.

    What is done, and so whether ranks communicate, depends on nothing that differs between them.
    """
    if mesh.tp_size > 1 and spread is None:
        return head  # cut like the student's

    def rows(values: Tensor) -> Tensor:
        if mesh.tp_size > 1:  # ranks hold rows in their own order, replicas of the student want them in another
            values = gather_ranks(values, mesh.tp_group).flatten(0, 1)
        return values[want.start : want.stop].clone() if mesh.tp_size > 1 else values[want.start : want.stop]

    bias = None if head.bias is None else rows(head.bias.detach())
    return HeadShard(rows(head.weight.detach()), bias, head.logit_scale, head.softcap)
