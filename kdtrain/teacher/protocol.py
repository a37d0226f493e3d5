"""What students and dedicated teachers say to each other over the wire, and how they learn of each other's end.

A client is the first tp rank of a student's data rank, a server the first tp rank of a teacher. Per micro-batch:

    client -> server   REQUEST  int64 [4]: ASK, B, S, 0          IDS     int64 [2, B, S]: input_ids, position_ids
    server -> client   ANSWER   int64 [2]: exit code, stop       HIDDEN  [B S, E] in the teacher's dtype

A client has room for the answer before it asks, so that no server ever waits for a slow one. REQUEST [BYE, 0, 0, exit
code] is a client's last word. A server passes each request on to the other ranks of its teacher, over the wire as well,
REQUEST then being int64 [5] with the client's rank in front: all wait as long as nobody asks. An exit code other
than 0 in ANSWER is a server's last word, said once for every answer that the client may be waiting for; the board says
why. stop: a rank of the teacher has been asked (by a signal) to end; the students then stop as if they had been.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch

from kdtrain.distributed.wire import Board, Wire
from kdtrain.errors import EXIT_DONE, EXIT_OTHER, ConfigError, KdtrainError, PeerLost

REQUEST, IDS, ANSWER, HIDDEN = 1, 2, 3, 4
"""Tags."""
ASK, BYE = 0, 1
"""Kinds of REQUEST."""
GRACE = timedelta(seconds=10)
"""How long a rank that fails gives the others to say so themselves before it ends, and the launcher ends them."""


def exit_code_of(error: BaseException) -> int:
    """What a process that ends by `error` exits with."""
    return error.exit_code if isinstance(error, KdtrainError) else EXIT_OTHER


def write_facts(board: Board, rank: int, facts: dict[str, Any]) -> None:
    """Tell all ranks what this one has loaded; each rank may do so once."""
    board.write(f"facts/{rank}", {"facts": facts})


def write_failure(board: Board, rank: int, error: BaseException) -> None:
    """Tell all ranks, now and later, why this one ends; without rank 0 there is nobody left to tell."""
    text = str(error) if isinstance(error, KdtrainError) else f"{type(error).__name__}: {error}"
    told = {"failure": text, "exit_code": exit_code_of(error)}
    with suppress(PeerLost):
        board.write(f"failure/{rank}", told)
        board.write(f"facts/{rank}", told)  # for whoever waits for facts that will never come


def failure_of(board: Board, rank: int, fallback: PeerLost) -> PeerLost:
    """Why the teacher on `rank` has ended, in its own words; `fallback` if it had none."""
    try:
        told = board.read(f"failure/{rank}", timedelta(seconds=2))
    except PeerLost:
        return fallback
    return _failure(rank, told)


def compare_facts(
    board: Board, teachers: Sequence[int], mine: dict[str, Any], timeout: timedelta
) -> list[dict[str, Any]]:
    """What each teacher has told of itself, once it has been held against `mine`: ConfigError naming both values,
    PeerLost if one failed."""
    found = []
    for rank in teachers:
        told = board.read(f"facts/{rank}", timeout)
        if "failure" in told:
            raise _failure(rank, told)
        theirs = told["facts"]
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


def _failure(rank: int, told: dict[str, Any]) -> PeerLost:
    return PeerLost(f"the teacher on rank {rank} ended: {told['failure']}", int(told["exit_code"]))


@contextmanager
def farewell(wire: Wire, servers: Sequence[int]) -> Iterator[None]:
    """A client's whole life: however the block ends, each server is told the exit code, and then ends as well."""
    try:
        yield
    except BaseException as error:
        _say_goodbye(wire, servers, exit_code_of(error))
        raise
    _say_goodbye(wire, servers, EXIT_DONE)


def _say_goodbye(wire: Wire, servers: Sequence[int], exit_code: int) -> None:
    words = []
    for server in servers:
        with suppress(PeerLost):  # one that has ended already has done all that it was to do
            words.append(wire.send(torch.tensor([BYE, 0, 0, exit_code]), server, REQUEST))
    for word in words:
        with suppress(PeerLost):
            word.wait(GRACE)
