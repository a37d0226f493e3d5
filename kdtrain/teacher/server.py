"""What a rank does that holds nothing but the teacher: wait for micro-batches, return their hidden states.

One thread per client waits for its requests and puts them into one queue; the main thread answers in the order of
arrival. Nothing of an answer depends on that order: every micro-batch is run by itself.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.distributed.collectives import reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.wire import Message, Wire
from kdtrain.documents import Documents
from kdtrain.errors import EXIT_DONE, EXIT_STOPPED, PeerLost, RunStopped
from kdtrain.run_state.heartbeat import PhaseTracker
from kdtrain.teacher.protocol import ANSWER, ASK, BYE, GRACE, HIDDEN, IDS, REQUEST, exit_code_of, write_failure


@dataclass(frozen=True, slots=True)
class Request:
    """kind: ASK or BYE. ids [2, B, S]: input_ids and position_ids, empty with BYE. exit_code: of a client's BYE."""

    client: int
    kind: int
    ids: Tensor
    exit_code: int = EXIT_DONE
    lost: PeerLost | None = None


class Inbox:
    """Everything that clients (global ranks) send, from the moment it is made, in the order of arrival."""

    def __init__(self, wire: Wire, clients: Sequence[int]) -> None:
        self._wire = wire
        self._queue: SimpleQueue[Request] = SimpleQueue()
        for client in clients:
            name = f"kdtrain-client-{client}"
            threading.Thread(target=self._listen, args=(client,), name=name, daemon=True).start()

    def take(self, timeout_s: float | None = None) -> Request | None:
        """The next one, waiting for it; None after timeout_s."""
        try:
            return self._queue.get(timeout=timeout_s)
        except Empty:
            return None

    def hear_goodbyes(self, clients: set[int], limit: timedelta = GRACE) -> None:
        """Wait until each of `clients` has said goodbye or is lost, but not longer than `limit`."""
        waiting, deadline = set(clients), time.monotonic() + limit.total_seconds()
        while waiting and (seconds := deadline - time.monotonic()) > 0:
            request = self.take(seconds)
            if request is not None and request.kind == BYE:
                waiting.discard(request.client)

    def _listen(self, client: int) -> None:
        """In a thread of its own: a receive from a named rank, unlike one from any, ends when that rank does."""
        nothing = torch.empty((2, 0, 0), dtype=torch.int64)
        kind = ASK
        while kind == ASK:
            try:
                head = self._wire.receive(torch.empty(4, dtype=torch.int64), client, REQUEST).wait()
                kind, rows, columns, exit_code = head.tolist()
                ids = nothing
                if kind == ASK:
                    ids = torch.empty((2, rows, columns), dtype=torch.int64)
                    self._wire.receive(ids, client, IDS).wait()
            except PeerLost as error:
                self._queue.put(Request(client, BYE, nothing, exit_code_of(error), error))
                return
            self._queue.put(Request(client, kind, ids, exit_code))


class TeacherServer:
    """Answers until all clients have said goodbye.

    mesh: the teachers' own; ranks of a tp group hold one teacher together, and its first one has the inbox (None on the
    others). forward: [B, S] sequences -> [B S, E] on every rank of the group. in_flight: requests of one client under
    way at a time. max_tokens: limit of one forward pass, but never less than a sequence; None: none. begun: called
    once, before the first answer. wants_stop: whether this rank has been asked to end. pulse: told what it does.
    """

    def __init__(
        self,
        wire: Wire,
        mesh: Mesh,
        inbox: Inbox | None,
        clients: Sequence[int],
        forward: Callable[[Batch], Tensor],
        *,
        device: torch.device,
        in_flight: int,
        max_tokens: int | None = None,
        begun: Callable[[], None] = lambda: None,
        wants_stop: Callable[[], bool] = lambda: False,
        pulse: PhaseTracker | None = None,
    ) -> None:
        self._wire, self._mesh, self._inbox, self._forward = wire, mesh, inbox, forward
        self._clients, self._device, self._wants_stop = list(clients), device, wants_stop
        self._begun, self._max_tokens = begun, max_tokens
        self._pulse = pulse or PhaseTracker(wire.rank)
        # A client that asks again has received all but its last in_flight answers, and one that was out of turn.
        self._most_open = in_flight + 1
        self._sent: dict[int, deque[tuple[Message, Message]]] = {c: deque(maxlen=self._most_open) for c in clients}
        self._listening = set(clients)
        self.num_answers = 0

    def run(self) -> None:
        """Serve. Raises RunStopped if the clients have stopped, PeerLost with its exit code if one failed.

        If this rank fails, or one client, the others are told why, and get time to end by themselves. Communicates:
        with clients, and over tp what each of them sent.
        """
        try:
            exit_codes = self._serve()
        except BaseException as error:
            self._give_up(error)
            raise
        if EXIT_STOPPED in exit_codes.values():
            raise RunStopped("stopped with the student's ranks")

    def _serve(self) -> dict[int, int]:
        exit_codes: dict[int, int] = {}
        while len(exit_codes) < len(self._clients):
            request = self._next_request()
            if request.kind == ASK:
                if self.num_answers == 0:
                    self._begun()
                self._pulse.begin(self.num_answers + 1)
                with self._pulse.phase("teacher"):
                    self._answer(request)
                continue
            exit_codes[request.client] = request.exit_code
            self._listening.discard(request.client)
            if request.lost is not None:
                raise request.lost
            if request.exit_code not in (EXIT_DONE, EXIT_STOPPED):
                raise PeerLost(f"rank {request.client} (student) failed; its message says why", request.exit_code)
        return exit_codes

    def _next_request(self) -> Request:
        """The same on every rank of a tp group: its first one takes it and passes it on."""
        if self._inbox is None:
            return self._passed_on()
        request = self._inbox.take()
        assert request is not None
        head = torch.tensor([request.client, request.kind, *request.ids.shape[1:], request.exit_code])
        first, sent = self._wire.rank, []
        for peer in range(first + 1, first + self._mesh.tp_size):
            sent.append(self._wire.send(head, peer, REQUEST))
            if request.ids.numel():
                sent.append(self._wire.send(request.ids, peer, IDS))
        for message in sent:
            message.wait()
        return request

    def _passed_on(self) -> Request:
        """What the group's first rank has taken. Over the wire: a collective's timeout would end a rank that idles."""
        first = self._wire.rank - self._mesh.tp_rank
        head = self._wire.receive(torch.empty(5, dtype=torch.int64), first, REQUEST).wait()
        client, kind, rows, columns, exit_code = head.tolist()
        ids = torch.empty((2, rows, columns), dtype=torch.int64)
        if ids.numel():
            self._wire.receive(ids, first, IDS).wait()
        return Request(client, kind, ids, exit_code)

    @torch.no_grad()
    def _answer(self, request: Request) -> None:
        input_ids, position_ids = request.ids.to(self._device).unbind(0)
        nothing = torch.zeros(input_ids.shape, device=self._device)
        documents = Documents.of(request.ids[1]).to(self._device)  # of the host's copy
        batch = Batch(input_ids, input_ids, nothing, position_ids, torch.zeros_like(input_ids[:, 0]), documents)
        hidden = torch.cat([self._forward(part).cpu() for part in batch.portions(self._max_tokens)])
        self.num_answers += 1
        stop = self._asked_to_stop()
        if self._inbox is not None:
            status = torch.tensor([EXIT_DONE, stop])
            self._sent[request.client].append(
                (
                    self._wire.send(status, request.client, ANSWER),
                    self._wire.send(hidden, request.client, HIDDEN),
                )
            )

    def _asked_to_stop(self) -> int:
        """Ranks of this teacher that have been asked to end: a signal may reach any one of them alone."""
        mine = torch.tensor([int(self._wants_stop())], device=self._device)
        return int(reduce_sum_(mine, self._mesh.tp_group))

    def _give_up(self, error: BaseException) -> None:
        write_failure(self._wire.board, self._wire.rank, error)
        if self._inbox is None:
            return  # its group's first rank, left alone in a collective, ends too
        last_words = []  # kept: they must live until they have arrived
        for client in self._listening:
            # One for every answer that it may be waiting for: which of them it waits for first, it alone knows.
            for _ in range(self._most_open):
                with suppress(PeerLost):
                    last_words.append(self._wire.send(torch.tensor([exit_code_of(error), 0]), client, ANSWER))
        self._inbox.hear_goodbyes(self._listening)
