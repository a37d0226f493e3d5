"""The dedicated teacher as the student's ranks see it: requests are sent ahead, hidden states come back.

The first tp rank of every data rank sends requests; the teacher works while the student's ranks compute. The rows of
the teacher's head are on the student's ranks, so the loss is the one of a co-hosted teacher. T = B S tokens, E the
teacher's width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from kdtrain.batch import Batch, BatchSource
from kdtrain.distributed.collectives import broadcast_first_
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.point_to_point import P2PChannel, P2PWork
from kdtrain.distributed.vocab import HeadShard
from kdtrain.errors import PeerLost
from kdtrain.teacher.protocol import ANSWER, FORWARD, HIDDEN, IDS, REQUEST, failure_of
from kdtrain.teacher.signal import DenseSignal


@dataclass(frozen=True, slots=True, eq=False)
class _PendingRequest:
    """A request in flight, found by the identity of its batch. `sends` keeps the tensors alive until they are sent."""

    batch: Batch
    server: int
    sends: tuple[P2PWork, ...]
    answer: P2PWork
    hidden: P2PWork


class RemoteTeacher:
    """A `SignalSource` of `DenseSignal`s that another rank computes.

    `prefetch` may announce the next step while answers of the present one are still in flight.

    mesh: the student's. head: this rank's rows of the teacher's head, sharded like the student's. servers: global
    ranks, used round-robin, so which server gets a micro-batch depends only on the order of the micro-batches.
    in_flight: the most requests of a data rank at a time, not counting one that was not announced; each needs a buffer
    [T, E] on both sides. timeout: of one answer. on_stop: called when a teacher reports a stop signal.
    """

    kind = "dense"

    def __init__(
        self,
        channel: P2PChannel,
        mesh: Mesh,
        head: HeadShard,
        servers: Sequence[int],
        *,
        in_flight: int,
        timeout: timedelta,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._channel, self._mesh, self._head = channel, mesh, head
        self._servers, self._timeout, self._on_stop = list(servers), timeout, on_stop
        self._max_in_flight = in_flight
        self._next_server = mesh.dp_rank  # data ranks start with different servers
        self._queued: deque[Batch] = deque()
        self._in_flight: list[_PendingRequest] = []

    def check(self, batches: BatchSource) -> None:
        """Nothing to compare: the teacher computes its signals from the batches that it receives."""

    def prefetch(self, micro_batches: Sequence[Batch]) -> None:
        """Queue these and send requests up to the limit. Batches already queued or in flight are skipped."""
        if self._mesh.tp_rank == 0:
            known = [*self._queued, *(request.batch for request in self._in_flight)]
            self._queued.extend(batch for batch in micro_batches if all(batch is not other for other in known))
            self._send_queued()

    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's hidden states of `batch`; waits for them if they have not arrived.

        Communicates: with one server, on the first tp rank; one broadcast of [T, E] over tp. Does not synchronise the
        device if the batch has its `host` copy. Raises PeerLost, with the teacher's own message, if it has failed.
        """
        if self._mesh.tp_rank == 0:
            # The result may be dropped at once: it is in pinned memory of torch's allocator, which records an event of
            # this copy and reuses the memory only after it.
            hidden = self._result(batch).to(self._head.weight.device, non_blocking=True)
            self._send_queued()
        else:
            hidden = self._head.weight.new_empty((batch.num_tokens, self._head.weight.shape[1]))
        # Only the first tp rank has received them, but every tp rank multiplies them with its rows of the head.
        return DenseSignal(broadcast_first_(hidden, self._mesh.tp_group), self._head)

    def _result(self, batch: Batch) -> Tensor:
        """[T, E] in host memory. Sends the request first if that has not been done. Raises PeerLost."""
        request = next((other for other in self._in_flight if other.batch is batch), None)
        if request is not None:
            self._in_flight.remove(request)
        else:  # not announced, or still queued because of the limit
            self._queued = deque(other for other in self._queued if other is not batch)
            request = self._send(batch)
        try:
            exit_code, stop = request.answer.wait(self._timeout).tolist()
            if exit_code:
                raise PeerLost(f"the teacher on rank {request.server} ended", exit_code)
            hidden = request.hidden.wait(self._timeout)
        except PeerLost as error:
            raise failure_of(self._channel.key_values, request.server, error) from error
        if stop:
            self._on_stop()
        return hidden

    def _send_queued(self) -> None:
        while self._queued and len(self._in_flight) < self._max_in_flight:
            self._in_flight.append(self._send(self._queued.popleft()))

    def _send(self, batch: Batch) -> _PendingRequest:
        server = self._servers[self._next_server % len(self._servers)]
        self._next_server += 1
        weight, pin = self._head.weight, self._head.weight.is_cuda
        buffer = torch.empty((batch.num_tokens, weight.shape[1]), dtype=weight.dtype, pin_memory=pin)
        answer = self._channel.receive(torch.empty(2, dtype=torch.int64), server, ANSWER)
        hidden = self._channel.receive(buffer, server, HIDDEN)
        host = batch.on_host()  # a copy from the device would wait for all work queued there
        ids = torch.stack([host.input_ids, host.position_ids])
        sends = (
            self._channel.send(torch.tensor([FORWARD, *batch.input_ids.shape, 0]), server, REQUEST),
            self._channel.send(ids, server, IDS),
        )
        return _PendingRequest(batch, server, sends, answer, hidden)
