"""Messages between students and dedicated teachers over the point-to-point channel, and how both sides shut down.

A client is the first tp rank of a student's data rank; a server is the first tp rank of a teacher. Per micro-batch:

    client -> server   REQUEST  int64 [4]: FORWARD, B, S, 0      IDS     int64 [2, B, S]: input_ids, position_ids
    server -> client   ANSWER   int64 [2]: exit code, stop       HIDDEN  [B S, E] in the teacher's dtype

A client posts its receives before it sends the request, so a server never waits for a slow client. A client's last
message is REQUEST [SHUTDOWN, 0, 0, exit code]. A server forwards each request to the other ranks of its teacher over
the channel, as int64 [5] with the client's rank in front: unlike a collective, a receive has no timeout while the
teacher is idle. A server that fails sends ANSWER with its exit code once for every answer that the client may be
waiting for, and writes the reason to the key-value store. stop: a rank of the teacher has received a stop signal; the
student's ranks then stop as if they had received it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch

from kdtrain.distributed.point_to_point import KeyValueStore, P2PChannel
from kdtrain.errors import EXIT_DONE, EXIT_OTHER, ConfigError, KdtrainError, PeerLost

REQUEST, IDS, ANSWER, HIDDEN = 1, 2, 3, 4
"""Tags."""
FORWARD, SHUTDOWN = 0, 1
"""Kinds of REQUEST."""
GRACE = timedelta(seconds=10)
"""How long a failing rank waits for the others to report and end before it ends: then the launcher kills them."""


def exit_code_of(error: BaseException) -> int:
    """Exit code of a process that ends with `error`."""
    return error.exit_code if isinstance(error, KdtrainError) else EXIT_OTHER


def write_facts(store: KeyValueStore, rank: int, facts: dict[str, Any]) -> None:
    """Publish what this rank has loaded, for all ranks to read; once per rank."""
    store.write(f"facts/{rank}", {"facts": facts})


def write_failure(store: KeyValueStore, rank: int, error: BaseException) -> None:
    """Publish why this rank ends. Does nothing if rank 0, which hosts the store, has ended."""
    text = str(error) if isinstance(error, KdtrainError) else f"{type(error).__name__}: {error}"
    failure = {"failure": text, "exit_code": exit_code_of(error)}
    with suppress(PeerLost):
        store.write(f"failure/{rank}", failure)
        store.write(f"facts/{rank}", failure)  # ends the wait of ranks that read the facts


def failure_of(store: KeyValueStore, rank: int, fallback: PeerLost) -> PeerLost:
    """The error that the teacher on `rank` published; `fallback` if it published none."""
    try:
        failure = store.read(f"failure/{rank}", timedelta(seconds=2))
    except PeerLost:
        return fallback
    return _failure(rank, failure)


def compare_facts(
    store: KeyValueStore, teachers: Sequence[int], mine: dict[str, Any], timeout: timedelta
) -> list[dict[str, Any]]:
    """The facts that each teacher published, compared with `mine`.

    Waits up to `timeout` for each. Raises ConfigError naming both values where they differ, and PeerLost if a teacher
    failed.
    """
    found = []
    for rank in teachers:
        published = store.read(f"facts/{rank}", timeout)
        if "failure" in published:
            raise _failure(rank, published)
        theirs = published["facts"]
        different = {key: (theirs.get(key), value) for key, value in mine.items() if theirs.get(key) != value}
        if different:
            listed = "\n".join(f"  {key}: {one} there, {other} here" for key, (one, other) in different.items())
            raise ConfigError(
                f"the teacher on rank {rank} is not what the student's ranks expect\n{listed}\n"
                "  why: its hidden states would be multiplied with another model's head\n"
                "  fix: give every node the same files and the same command line"
            )
        found.append(theirs)
    return found


def _failure(rank: int, failure: dict[str, Any]) -> PeerLost:
    return PeerLost(f"the teacher on rank {rank} ended: {failure['failure']}", int(failure["exit_code"]))


@contextmanager
def shutdown_on_exit(channel: P2PChannel, servers: Sequence[int]) -> Iterator[None]:
    """Send SHUTDOWN with the exit code to each server when the block ends, normally or by an error."""
    try:
        yield
    except BaseException as error:
        _send_shutdown(channel, servers, exit_code_of(error))
        raise
    _send_shutdown(channel, servers, EXIT_DONE)


def _send_shutdown(channel: P2PChannel, servers: Sequence[int], exit_code: int) -> None:
    sends = []
    for server in servers:
        with suppress(PeerLost):  # a server that has ended already needs no message
            sends.append(channel.send(torch.tensor([SHUTDOWN, 0, 0, exit_code]), server, REQUEST))
    for work in sends:
        with suppress(PeerLost):
            work.wait(GRACE)
