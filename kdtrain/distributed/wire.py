"""Messages between ranks that share no world: tensors from one rank to another, and a board that all can read.

Students and dedicated teachers have a default process group each (`kdtrain.distributed.roles`), so neither takes part
in the other's collectives. What goes between them is on the host's memory and on gloo, whatever the ranks compute on: a
message waits for nobody's device and for no other message, and a rank that dies is noticed by whoever waits for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from kdtrain.errors import PeerLost

FOREVER = timedelta(days=365)
"""A rank that serves waits as long as nobody asks; one that asks states how long it waits."""


@dataclass(frozen=True, slots=True)
class Message:
    """A tensor on its way. It must not be read (received) or changed (sent) before `wait` has returned."""

    tensor: Tensor
    peer: int
    work: dist.Work

    def wait(self, timeout: timedelta = FOREVER) -> Tensor:
        """The tensor, arrived or sent. Raises PeerLost if the peer has ended, or has not answered within `timeout`."""
        try:
            self.work.wait(timeout)
        except RuntimeError as error:  # gloo's: the connection is gone, or the time is over
            raise _lost(self.peer, error) from error
        return self.tensor


def _words(error: RuntimeError) -> str:
    """What gloo says, without the place in its source before it and its guess after it."""
    first = str(error).partition("\n")[0].partition(" This is typically")[0]
    return first.partition("] ")[2] if first.startswith("[") else first


def _lost(peer: int, error: RuntimeError) -> PeerLost:
    return PeerLost(
        f"rank {peer} has ended or does not answer: {_words(error)}\n"
        f"  why: students and teachers of a run end together\n  fix: look at what rank {peer} said last"
    )


def _board_lost() -> PeerLost:
    return PeerLost(
        "rank 0, which keeps what ranks tell each other, has ended\n"
        "  why: students and teachers of a run end together\n  fix: look at what rank 0 said last"
    )


class Board:
    """Short facts that a rank writes once and any other reads: a key-value store of plain values."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, key: str, facts: dict[str, Any]) -> None:
        """Let all ranks read `facts` (JSON) under `key`. Raises PeerLost if the store's host, rank 0, has ended."""
        try:
            self._store.set(key, json.dumps(facts))
        except RuntimeError as error:  # the store's
            raise _board_lost() from error

    def read(self, key: str, timeout: timedelta) -> dict[str, Any]:
        """What stands under `key`, as soon as somebody has written it.

        Raises PeerLost after `timeout`, and as soon as the store's host, rank 0, has ended.
        """
        try:
            self._store.wait([key], timeout)
        except dist.DistNetworkError as error:
            raise _board_lost() from error
        except RuntimeError as error:  # the store's, of several classes
            raise PeerLost(
                f"nobody has written {key!r} within {timeout.total_seconds():.0f} s\n"
                "  why: students and teachers of a run tell each other what they have loaded\n"
                "  fix: look at what the other ranks said last; DEEPSPEED_TIMEOUT (minutes) sets how long they wait"
            ) from error
        found: dict[str, Any] = json.loads(self._store.get(key))
        return found


class Wire:
    """Point-to-point messages among all ranks of the job, of either role, by their global rank.

    Every rank of the job must construct it, with its own view of one store. Messages between two ranks with one tag
    arrive in the order of their sending. Communicates: rendezvous of all ranks.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.board = Board(PrefixStore("kdtrain_board", store))
        # Not `new_group`: that makes groups out of the ranks of a default group, and no default group has all of them.
        self._group: Any = ProcessGroupGloo(PrefixStore("kdtrain_wire", store), rank, world_size, FOREVER)

    def send(self, tensor: Tensor, to: int, tag: int) -> Message:
        """Start sending a contiguous tensor of the host; it leaves when `to` has asked for it, this returns at once.

        Raises PeerLost if `to` is known to have ended.
        """
        try:
            return Message(tensor, to, self._group.send([tensor], to, tag))
        except RuntimeError as error:
            raise _lost(to, error) from error

    def receive(self, tensor: Tensor, source: int, tag: int) -> Message:
        """Start filling `tensor` with the next message of `source` under `tag`, and return at once.

        Raises PeerLost if `source` is known to have ended.
        """
        try:
            return Message(tensor, source, self._group.recv([tensor], source, tag))
        except RuntimeError as error:
            raise _lost(source, error) from error

    def barrier(self) -> None:
        """Wait for all ranks of both roles. Communicates. Raises PeerLost if one of them has ended."""
        try:
            self._group.barrier().wait()
        except RuntimeError as error:
            raise PeerLost(
                f"another rank has ended before rank {self.rank}: {_words(error)}\n"
                "  why: students and teachers of a run end together\n  fix: look at what the other ranks said last"
            ) from error
