"""The process of a dedicated teacher's rank: receive micro-batches, send back their hidden states.

One thread per client receives its requests and puts them into one queue; the main thread answers in order of arrival.
Answers do not depend on that order: every micro-batch has a forward pass of its own.
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
from kdtrain.distributed.point_to_point import P2PChannel, P2PWork
from kdtrain.documents import Documents
from kdtrain.errors import EXIT_DONE, EXIT_STOPPED, PeerLost, RunStopped
from kdtrain.run_state.heartbeat import PhaseTracker
from kdtrain.teacher.protocol import ANSWER, FORWARD, GRACE, HIDDEN, IDS, REQUEST, SHUTDOWN, exit_code_of, write_failure


@dataclass(frozen=True, slots=True)
class Request:
    """kind: FORWARD or SHUTDOWN. ids [2, B, S]: input_ids and position_ids, empty for SHUTDOWN.

    exit_code: the client's, with SHUTDOWN. lost: set when the client ended without one.
    """

    client: int
    kind: int
    ids: Tensor
    exit_code: int = EXIT_DONE
    lost: PeerLost | None = None


class Inbox:
    """Requests of all clients (global ranks) in order of arrival, received from construction on."""

    def __init__(self, channel: P2PChannel, clients: Sequence[int]) -> None:
        self._channel = channel
        self._queue: SimpleQueue[Request] = SimpleQueue()
        for client in clients:
            name = f"kdtrain-client-{client}"
            threading.Thread(target=self._listen, args=(client,), name=name, daemon=True).start()

    def take(self, timeout_s: float | None = None) -> Request | None:
        """Wait for the next request; None after timeout_s."""
        try:
            return self._queue.get(timeout=timeout_s)
        except Empty:
            return None

    def drain(self, clients: set[int], limit: timedelta = GRACE) -> None:
        """Wait until each of `clients` has shut down or is lost, at most `limit`; other requests are discarded."""
        waiting, deadline = set(clients), time.monotonic() + limit.total_seconds()
        while waiting and (seconds := deadline - time.monotonic()) > 0:
            request = self.take(seconds)
            if request is not None and request.kind == SHUTDOWN:
                waiting.discard(request.client)

    def _listen(self, client: int) -> None:
        """Body of one thread: a receive from a given rank, unlike one from any rank, fails when that rank ends."""
        no_ids = torch.empty((2, 0, 0), dtype=torch.int64)
        kind = FORWARD
        while kind == FORWARD:
            try:
                head = self._channel.receive(torch.empty(4, dtype=torch.int64), client, REQUEST).wait()
                kind, rows, columns, exit_code = head.tolist()
                ids = no_ids
                if kind == FORWARD:
                    ids = torch.empty((2, rows, columns), dtype=torch.int64)
                    self._channel.receive(ids, client, IDS).wait()
            except PeerLost as error:
                self._queue.put(Request(client, SHUTDOWN, no_ids, exit_code_of(error), error))
                return
            self._queue.put(Request(client, kind, ids, exit_code))


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """device: of the forward pass. in_flight: most requests of one client at a time. max_tokens: limit of one forward
    pass, but never less than a sequence; None: no limit."""

    device: torch.device
    in_flight: int
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ServerHooks:
    """What the process around a server provides.

    on_first_request: called once, before the first answer. stop_requested: whether this process has received a stop
    signal. tracker: records the phase for heartbeats; None: a new one.
    """

    on_first_request: Callable[[], None] = lambda: None
    stop_requested: Callable[[], bool] = lambda: False
    tracker: PhaseTracker | None = None


class TeacherServer:
    """Answers requests until all clients have shut down.

    mesh: of the teacher's ranks. The ranks of a tp group share one teacher; the first of them has the inbox, the others
    None. forward: [B, S] sequences on settings.device -> [B S, E] on every rank of the group.
    """

    def __init__(
        self,
        channel: P2PChannel,
        mesh: Mesh,
        inbox: Inbox | None,
        clients: Sequence[int],
        forward: Callable[[Batch], Tensor],
        settings: ServerSettings,
        hooks: ServerHooks = ServerHooks(),
    ) -> None:
        self._channel, self._mesh, self._inbox, self._forward = channel, mesh, inbox, forward
        self._clients, self._settings, self._hooks = list(clients), settings, hooks
        self._tracker = hooks.tracker or PhaseTracker(channel.rank)
        # Answers that a client may not have received yet: of in_flight requests, and of one that was not announced.
        self._max_pending = settings.in_flight + 1
        self._sent: dict[int, deque[tuple[P2PWork, P2PWork]]] = {c: deque(maxlen=self._max_pending) for c in clients}
        self._active = set(clients)
        self.num_answers = 0

    def run(self) -> None:
        """Serve. Raises RunStopped if the clients have stopped, PeerLost with the client's exit code if one failed.

        If this rank or a client fails, the other clients receive the reason and have GRACE to end by themselves.
        Communicates: with clients, and over tp what each of them sent.
        """
        try:
            exit_codes = self._serve()
        except BaseException as error:
            self._abort(error)
            raise
        if EXIT_STOPPED in exit_codes.values():
            raise RunStopped("stopped with the student's ranks")

    def _serve(self) -> dict[int, int]:
        exit_codes: dict[int, int] = {}
        while len(exit_codes) < len(self._clients):
            request = self._next_request()
            if request.kind == FORWARD:
                if self.num_answers == 0:
                    self._hooks.on_first_request()
                self._tracker.begin(self.num_answers + 1)
                with self._tracker.phase("teacher"):
                    self._answer(request)
                continue
            exit_codes[request.client] = request.exit_code
            self._active.discard(request.client)
            if request.lost is not None:
                raise request.lost
            if request.exit_code not in (EXIT_DONE, EXIT_STOPPED):
                raise PeerLost(f"rank {request.client} (student) failed; see its error message", request.exit_code)
        return exit_codes

    def _next_request(self) -> Request:
        """The next request, the same on every rank of a tp group: its first rank takes it and forwards it."""
        if self._inbox is None:
            return self._forwarded_request()
        request = self._inbox.take()
        assert request is not None
        head = torch.tensor([request.client, request.kind, *request.ids.shape[1:], request.exit_code])
        first, sends = self._channel.rank, []
        for peer in range(first + 1, first + self._mesh.tp_size):
            sends.append(self._channel.send(head, peer, REQUEST))
            if request.ids.numel():
                sends.append(self._channel.send(request.ids, peer, IDS))
        for work in sends:
            work.wait()
        return request

    def _forwarded_request(self) -> Request:
        """The request that the group's first rank took. Not a broadcast, whose timeout would end an idle teacher."""
        first = self._channel.rank - self._mesh.tp_rank
        head = self._channel.receive(torch.empty(5, dtype=torch.int64), first, REQUEST).wait()
        client, kind, rows, columns, exit_code = head.tolist()
        ids = torch.empty((2, rows, columns), dtype=torch.int64)
        if ids.numel():
            self._channel.receive(ids, first, IDS).wait()
        return Request(client, kind, ids, exit_code)

    @torch.no_grad()
    def _answer(self, request: Request) -> None:
        input_ids, position_ids = request.ids.to(self._settings.device).unbind(0)
        no_loss = torch.zeros(input_ids.shape, device=self._settings.device)
        documents = Documents.of(request.ids[1]).to(self._settings.device)  # from the host's copy
        batch = Batch(input_ids, input_ids, no_loss, position_ids, torch.zeros_like(input_ids[:, 0]), documents)
        hidden = torch.cat([self._forward(part).cpu() for part in batch.portions(self._settings.max_tokens)])
        self.num_answers += 1
        stop = self._num_stop_requests()
        if self._inbox is not None:
            status = torch.tensor([EXIT_DONE, stop])
            self._sent[request.client].append(
                (
                    self._channel.send(status, request.client, ANSWER),
                    self._channel.send(hidden, request.client, HIDDEN),
                )
            )

    def _num_stop_requests(self) -> int:
        """How many ranks of this teacher have received a stop signal. Communicates: one all-reduce over tp."""
        mine = torch.tensor([int(self._hooks.stop_requested())], device=self._settings.device)
        # The signal may reach any one rank, but only the first one answers clients.
        return int(reduce_sum_(mine, self._mesh.tp_group))

    def _abort(self, error: BaseException) -> None:
        write_failure(self._channel.key_values, self._channel.rank, error)
        if self._inbox is None:
            return  # the group's first rank fails in its next collective and ends too
        abort_messages = []  # keeps the tensors alive until they are sent
        for client in self._active:
            # One for every answer that the client may be waiting for; which one it waits for first is unknown here.
            for _ in range(self._max_pending):
                with suppress(PeerLost):
                    abort_messages.append(self._channel.send(torch.tensor([exit_code_of(error), 0]), client, ANSWER))
        self._inbox.drain(self._active)
