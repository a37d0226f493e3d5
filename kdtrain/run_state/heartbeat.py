"""Progress of every rank in files that all others can read, and a watchdog thread that detects a stall.

<run folder>/heartbeat/rank_00000    JSON: progress of that rank, see `Heartbeat`

Uses no collectives, in which a hanging rank could not take part. Files are replaced atomically, at most once a second,
and only after a change; a file may be LONGEST_S older than the rank's progress.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from kdtrain.errors import EXIT_OTHER
from kdtrain.log import LOGGER
from kdtrain.telemetry.console import format_table

FOLDER = "heartbeat"
SHORTEST_S, LONGEST_S = 1.0, 5.0
"""Bounds of the seconds between two checks of a watchdog, which are a quarter of the warning's limit."""
GRACE_S = 30.0
"""Limit in seconds for the watchdog's report before it ends the process."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Progress of a rank. All ranks of a run go through the same phases in the same order.

    step: the current one. count: phases completed since its process started. done: the last completed one, of
    done_step, since `time` (seconds since 1970, the rank's own clock). now: the phase it is in, "" between two. On CUDA
    a phase is completed when its work has been submitted to the device.
    """

    rank: int
    host: str
    step: int = 0
    count: int = 0
    done: str = "start"
    done_step: int = 0
    time: float = 0.0
    now: str = ""


class PhaseTracker:
    """This rank's current `Heartbeat`, updated by the thread that trains. Needs no lock: other threads only read it."""

    def __init__(
        self, rank: int = 0, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self.clock, self.wall = clock, wall
        self._nested: list[str] = []
        self.beat = Heartbeat(rank, socket.gethostname(), time=wall())
        self.since = clock()
        """When the current step, evaluation or save began, by `clock`."""

    def begin(self, step: int) -> None:
        """Work on `step` begins; the watchdog's time is measured from here."""
        self.since = self.clock()
        self.beat = replace(self.beat, step=step)  # a new object each time: a reader never sees a partial change

    @contextmanager
    def phase(self, name: str, *, apart: bool = False) -> Iterator[None]:
        """The block is phase `name`. apart: it is not part of a step (evaluate, save) and is measured separately."""
        if apart:
            self.since = self.clock()
        self._nested.append(name)
        self.beat = replace(self.beat, now=name)
        yield
        self._nested.pop()
        now = self._nested[-1] if self._nested else ""
        self.beat = replace(
            self.beat, count=self.beat.count + 1, done=name, done_step=self.beat.step, time=self.wall(), now=now
        )
        if apart:
            self.since = self.clock()


def clear_heartbeats(run_folder: Path) -> None:
    """Remove heartbeats of former processes. Call on one rank, before any `Watchdog` starts."""
    shutil.rmtree(run_folder / FOLDER, ignore_errors=True)


def read_heartbeats(run_folder: Path, world_size: int) -> dict[int, Heartbeat]:
    """rank -> its last heartbeat, for ranks with a readable one. Does not communicate."""
    return _read(run_folder, range(world_size))


def _read(run_folder: Path, ranks: Iterable[int]) -> dict[int, Heartbeat]:
    found = {}
    for rank in ranks:
        try:
            found[rank] = Heartbeat(**json.loads(heartbeat_path(run_folder, rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # never written, or damaged
            continue
    return found


def heartbeat_path(run_folder: Path, rank: int) -> Path:
    """File of `rank`."""
    return run_folder / FOLDER / f"rank_{rank:05d}"


def ranks_behind(beats: dict[int, Heartbeat], world_size: int) -> list[int]:
    """Ranks that have completed fewer phases than the foremost one, and those without a heartbeat."""
    most = max((beat.count for beat in beats.values()), default=0)
    return [rank for rank in range(world_size) if rank not in beats or beats[rank].count < most]


class Watchdog:
    """A thread that writes this rank's heartbeat and, when a step takes too long, logs which ranks are behind.

    folder: of the run. teachers: ranks beyond world_size that hold only the teacher; they have phases of their own, and
    their last heartbeats are added to the report. warn_s, exit_s: guard.stall_warn_s and guard.stall_exit_s.
    on_exit: called with one line before the process is ended by `end`; its OSError is ignored, and if it hangs the
    process ends GRACE_S later. As a context manager it runs inside the block. Never communicates.
    """

    def __init__(
        self,
        tracker: PhaseTracker,
        folder: Path,
        world_size: int,
        *,
        teachers: Sequence[int] = (),
        warn_s: float,
        exit_s: float | None = None,
        on_exit: Callable[[str], None] = lambda why: None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._tracker, self._folder, self._world_size, self._teachers = tracker, folder, world_size, list(teachers)
        self._warn_s, self._exit_s = warn_s, exit_s
        self._on_exit, self._end = on_exit, end
        self._every = min(max(SHORTEST_S, warn_s / 4), LONGEST_S)
        self._since = tracker.since
        self._warn_at = warn_s
        self._written: Heartbeat | None = None
        self._can_write = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kdtrain-watchdog", daemon=True)
        self._backstop = threading.Thread(target=self._end_anyway, name="kdtrain-watchdog-end", daemon=True)

    def __enter__(self) -> Watchdog:
        self.look()
        self._thread.start()
        if self._exit_s is not None:
            self._backstop.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._write(self._tracker.beat)

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.look()

    def _end_anyway(self) -> None:
        """Runs in a thread that accesses no file and writes no log, since `look` may hang in either."""
        assert self._exit_s is not None
        while not self._stop.wait(self._every):
            if self._tracker.clock() - self._tracker.since >= self._exit_s + GRACE_S:
                self._end(EXIT_OTHER)

    def look(self) -> None:
        """Write the heartbeat if it is new; warn after warn_s of the current work, end the process after exit_s."""
        self._write(self._tracker.beat)
        if self._tracker.since != self._since:
            self._since, self._warn_at = self._tracker.since, self._warn_s
        waited = self._tracker.clock() - self._since
        if self._exit_s is not None and waited >= self._exit_s:
            self._exit(waited)
        elif waited >= self._warn_at:
            self._warn_at = 2 * max(waited, self._warn_at)  # again when the wait has doubled
            LOGGER.warning("stall    %s", self._report(waited))

    def _write(self, beat: Heartbeat) -> None:
        if beat == self._written:
            return
        path = heartbeat_path(self._folder, beat.rank)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
            os.replace(temporary, path)  # not flushed to disk: not needed after a power failure
            self._written, self._can_write = beat, True
        except OSError as error:
            if self._can_write:
                text = "stall    cannot write %s: %s; other ranks cannot see this rank's progress"
                LOGGER.warning(text, path, error.strerror)
            self._can_write = False

    def _report(self, waited: float) -> str:
        beat, beats = self._tracker.beat, read_heartbeats(self._folder, self._world_size)
        late = ranks_behind(beats, self._world_size)
        text = f"rank {beat.rank}: step {beat.step} has taken {waited:.0f} s ({beat.now or 'between phases'})"
        if self._teachers:
            found = _read(self._folder, self._teachers)
            text += (
                f"; teachers: {', '.join(_summary(r, found.get(r), self._tracker.wall()) for r in self._teachers[:8])}"
            )
        if not late:
            return text + "; all ranks have completed the same phases"
        shown = [_summary(rank, beats.get(rank), self._tracker.wall()) for rank in late[:8]]
        more = f" and {len(late) - 8} more" if len(late) > 8 else ""
        return f"{text}; behind: {', '.join(shown)}{more}"

    def _exit(self, waited: float) -> None:
        late = f"{self._report(waited)}\n  why: guard.stall_exit_s = {self._exit_s:g} s have passed"
        beats, now = read_heartbeats(self._folder, self._world_size), self._tracker.wall()
        rows = [
            {
                "rank": b.rank,
                "host": b.host,
                "step": b.step,
                "phases": b.count,
                "completed": f"{b.done}/{b.done_step}",
                "in": b.now or "-",
                "seconds ago": round(now - b.time),
            }
            for b in beats.values()
        ]
        with contextlib.suppress(OSError):  # the reader of stderr may have ended
            print(f"kdtrain: {late}", format_table(rows) if rows else "", sep="\n", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        with contextlib.suppress(OSError):  # a full or failed disk
            self._on_exit(late.partition("\n")[0])
        self._end(EXIT_OTHER)


def _summary(rank: int, beat: Heartbeat | None, now: float) -> str:
    if beat is None:
        return f"rank {rank} (no heartbeat)"
    doing = f", now in {beat.now}" if beat.now else ""
    ago = f"{now - beat.time:.0f} s ago"
    return f"rank {rank} on {beat.host} (completed {beat.done} of step {beat.done_step} {ago}{doing})"
