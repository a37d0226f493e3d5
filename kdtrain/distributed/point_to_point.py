"""Point-to-point channel and key-value store between ranks that share no default process group.

Students and dedicated teachers have a default process group each (`kdtrain.distributed.roles`), so neither role takes
part in the other's collectives. Tensors between them go through host memory and gloo, on any device: a transfer
synchronises no device and waits for no other transfer, and a rank that waits for a dead peer gets an error.
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
"""Timeout of a server, which may be idle for any time. A client passes its own timeout to `wait`."""


@dataclass(frozen=True, slots=True)
class P2PWork:
    """A transfer in progress. Until `wait` returns, its tensor must not be read (receive) or changed (send)."""

    tensor: Tensor
    peer: int
    work: dist.Work

    def wait(self, timeout: timedelta = FOREVER) -> Tensor:
        """The tensor, once received or sent. Raises PeerLost if the peer has ended, and after `timeout`."""
        try:
            self.work.wait(timeout)
        except RuntimeError as error:  # gloo: connection closed or timeout
            raise _lost(self.peer, error) from error
        return self.tensor


def _reason(error: RuntimeError) -> str:
    """gloo's message without the source location before it and the guess after it."""
    first = str(error).partition("\n")[0].partition(" This is typically")[0]
    return first.partition("] ")[2] if first.startswith("[") else first


def _lost(peer: int, error: RuntimeError) -> PeerLost:
    return PeerLost(
        f"rank {peer} has ended or does not respond: {_reason(error)}\n"
        f"  why: students and teachers of a run end together\n  fix: see the last messages of rank {peer}"
    )


def _store_lost() -> PeerLost:
    return PeerLost(
        "rank 0, which hosts the key-value store of the job, has ended\n"
        "  why: students and teachers of a run end together\n  fix: see the last messages of rank 0"
    )


class KeyValueStore:
    """Small JSON values that one rank writes once and every rank can read."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, key: str, value: dict[str, Any]) -> None:
        """Store `value` (JSON) under `key`. Raises PeerLost if the store's host, rank 0, has ended."""
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError as error:  # the store's
            raise _store_lost() from error

    def read(self, key: str, timeout: timedelta) -> dict[str, Any]:
        """The value under `key`; waits until it has been written.

        Raises PeerLost after `timeout`, and as soon as the store's host, rank 0, has ended.
        """
        try:
            self._store.wait([key], timeout)
        except dist.DistNetworkError as error:
            raise _store_lost() from error
        except RuntimeError as error:  # the store's, of several classes
            raise PeerLost(
                f"{key!r} was not written within {timeout.total_seconds():.0f} s\n"
                "  why: students and teachers of a run exchange what they have loaded\n"
                "  fix: see the last messages of the other ranks; DEEPSPEED_TIMEOUT (minutes) sets the timeout"
            ) from error
        value: dict[str, Any] = json.loads(self._store.get(key))
        return value


class P2PChannel:
    """Point-to-point transfers among all ranks of the job, of either role, by global rank.

    Every rank of the job must construct it, with its own view of one store. Transfers between two ranks with one tag
    arrive in the order in which they were sent. Communicates: rendezvous of all ranks.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.key_values = KeyValueStore(PrefixStore("kdtrain_key_values", store))
        # Not `new_group`: it takes ranks of the default group, and no default group contains all ranks of the job.
        self._group: Any = ProcessGroupGloo(PrefixStore("kdtrain_p2p", store), rank, world_size, FOREVER)

    def send(self, tensor: Tensor, to: int, tag: int) -> P2PWork:
        """Start sending a contiguous host tensor and return at once; it is sent when `to` has posted its receive.

        Raises PeerLost if `to` is known to have ended.
        """
        try:
            return P2PWork(tensor, to, self._group.send([tensor], to, tag))
        except RuntimeError as error:
            raise _lost(to, error) from error

    def receive(self, tensor: Tensor, source: int, tag: int) -> P2PWork:
        """Start receiving the next transfer of `source` under `tag` into `tensor`, and return at once.

        Raises PeerLost if `source` is known to have ended.
        """
        try:
            return P2PWork(tensor, source, self._group.recv([tensor], source, tag))
        except RuntimeError as error:
            raise _lost(source, error) from error

    def barrier(self) -> None:
        """Wait for all ranks of both roles. Communicates. Raises PeerLost if one of them has ended."""
        try:
            # All ranks of the job: no default process group contains both roles.
            self._group.barrier().wait()
        except RuntimeError as error:
            raise PeerLost(
                f"another rank has ended before rank {self.rank}: {_reason(error)}\n"
                "  why: students and teachers of a run end together\n  fix: see the last messages of the other ranks"
            ) from error
