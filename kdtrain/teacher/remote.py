"""The teacher as the student's ranks see it when it lives on ranks of its own: asked ahead, answered in hidden states.

Every data rank's first tp rank asks; the teacher works while the student's ranks do something else. The rows of the
teacher's head are here, so the loss is the one with a co-hosted teacher. T = B S tokens, E the teacher's width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.distributed.collectives import broadcast_first_
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import HeadShard
from kdtrain.distributed.wire import Message, Wire
from kdtrain.errors import PeerLost
from kdtrain.teacher.protocol import ANSWER, ASK, HIDDEN, IDS, REQUEST, failure_of
from kdtrain.teacher.signal import DenseSignal


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A micro-batch under way, found by the batch itself; sent must live until it has arrived."""

    batch: Batch
    server: int
    sent: tuple[Message, ...]
    answer: Message
    hidden: Message


class RemoteTeacher:
    """Turns a micro-batch into a `DenseSignal` that another rank computes.

    `begin_step` may be told of the next step while answers of this one are still to come.

    mesh: the student's. head: this rank's rows of the teacher's head, cut like the student's. servers: global ranks to
    ask, in turn, so who answers what depends on nothing but the order of the micro-batches. in_flight: requests of a
    data rank under way at a time, and one more that nobody was told of; each needs room for [T, E] here and there.
    timeout: of one answer. on_stop: called when a teacher has been asked to end.
    """

    def __init__(
        self,
        wire: Wire,
        mesh: Mesh,
        head: HeadShard,
        servers: Sequence[int],
        *,
        in_flight: int,
        timeout: timedelta,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._wire, self._mesh, self._head = wire, mesh, head
        self._servers, self._in_flight, self._timeout, self._on_stop = list(servers), in_flight, timeout, on_stop
        self._next_server = mesh.dp_rank  # data ranks begin with different teachers
        self._told: deque[Batch] = deque()
        self._asked: list[_Asked] = []

    def begin_step(self, micro_batches: Sequence[Batch]) -> None:
        """Ask for these, as far as `in_flight` allows, before they are needed. Those already known are passed over."""
        if self._mesh.tp_rank == 0:
            known = [*self._told, *(asked.batch for asked in self._asked)]
            self._told.extend(batch for batch in micro_batches if all(batch is not other for other in known))
            self._ask_ahead()

    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's view of `batch`; waits for it if need be.

        Communicates: with one teacher, on the first tp rank; one broadcast of [T, E] over tp. Does not synchronise the
        device if the batch knows its `host`. Raises PeerLost, with the teacher's own words, if it has failed.
        """
        if self._mesh.tp_rank == 0:
            # The answer is in pinned memory of torch's allocator, which gives it away again only once this copy, of
            # which it keeps an event, is done: the tensor may be dropped before.
            hidden = self._arrived(batch).to(self._head.weight.device, non_blocking=True)
            self._ask_ahead()
        else:
            hidden = self._head.weight.new_empty((batch.num_tokens, self._head.weight.shape[1]))
        return DenseSignal(broadcast_first_(hidden, self._mesh.tp_group), self._head)

    def _arrived(self, batch: Batch) -> Tensor:
        asked = next((other for other in self._asked if other.batch is batch), None)
        if asked is not None:
            self._asked.remove(asked)
        else:  # not announced, or not yet sent because as many as allowed are in flight
            self._told = deque(other for other in self._told if other is not batch)
            asked = self._ask(batch)
        try:
            exit_code, stop = asked.answer.wait(self._timeout).tolist()
            if exit_code:
                raise PeerLost(f"the teacher on rank {asked.server} ended", exit_code)
            hidden = asked.hidden.wait(self._timeout)
        except PeerLost as error:
            raise failure_of(self._wire.board, asked.server, error) from error
        if stop:
            self._on_stop()
        return hidden

    def _ask_ahead(self) -> None:
        while self._told and len(self._asked) < self._in_flight:
            batch = self._told.popleft()
            self._asked.append(self._ask(batch))

    def _ask(self, batch: Batch) -> _Asked:
        server = self._servers[self._next_server % len(self._servers)]
        self._next_server += 1
        weight, pin = self._head.weight, self._head.weight.is_cuda
        room = torch.empty((batch.num_tokens, weight.shape[1]), dtype=weight.dtype, pin_memory=pin)
        answer = self._wire.receive(torch.empty(2, dtype=torch.int64), server, ANSWER)
        hidden = self._wire.receive(room, server, HIDDEN)
        host = batch.on_host()  # a copy back would wait for all that is queued on the device
        ids = torch.stack([host.input_ids, host.position_ids])
        sent = (
            self._wire.send(torch.tensor([ASK, *batch.input_ids.shape, 0]), server, REQUEST),
            self._wire.send(ids, server, IDS),
        )
        return _Asked(batch, server, sent, answer, hidden)
