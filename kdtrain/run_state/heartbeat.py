"""What every rank is doing, in files that all others can read, and a thread on each that notices when nothing moves.

<run folder>/heartbeat/rank_00000    JSON: where that rank is, see `Beat`

No collective takes part: a rank that hangs in one could not say so. Files are replaced atomically, at most once a
second, and only when something has changed, so what a rank said last may be LONGEST_S old.
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
"""Seconds between two looks of a watchdog: a quarter of the warning's limit, within these."""
GRACE_S = 30.0
"""Seconds that a watchdog takes at most to say why it ends the process."""


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank is. All ranks of a run go through the same phases in the same order.

    step: the one it works on. count: phases completed since its process started. done: the last completed one, of
    done_step, since `time` (seconds since 1970, the rank's own clock). now: the phase it is in, "" between two. On CUDA
    a phase is completed when its work has been handed to the device.
    """

    rank: int
    host: str
    step: int = 0
    count: int = 0
    done: str = "start"
    done_step: int = 0
    time: float = 0.0
    now: str = ""


class Pulse:
    """This rank's present `Beat`, kept up by whoever does the work. Costs no file and no lock: others only read it."""

    def __init__(
        self, rank: int = 0, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._clock, self._wall = clock, wall
        self._nested: list[str] = []
        self.beat = Beat(rank, socket.gethostname(), time=wall())
        self.since = clock()
        """When the present step, evaluation or save began, by `clock`."""

    def begin(self, step: int) -> None:
        """Work on `step` begins; what may take long is measured from here."""
        self.since = self._clock()
        self.beat = replace(self.beat, step=step)  # always a new object: a reader never sees half a change

    @contextmanager
    def phase(self, name: str, *, apart: bool = False) -> Iterator[None]:
        """The block is phase `name`. apart: it is no part of a step (evaluate, save) and is measured by itself."""
        if apart:
            self.since = self._clock()
        self._nested.append(name)
        self.beat = replace(self.beat, now=name)
        yield
        self._nested.pop()
        now = self._nested[-1] if self._nested else ""
        self.beat = replace(
            self.beat, count=self.beat.count + 1, done=name, done_step=self.beat.step, time=self._wall(), now=now
        )
        if apart:
            self.since = self._clock()


def clear_beats(run_folder: Path) -> None:
    """Remove what former processes said. Call on one rank, before any `Watchdog` starts."""
    shutil.rmtree(run_folder / FOLDER, ignore_errors=True)


def read_beats(run_folder: Path, world_size: int) -> dict[int, Beat]:
    """rank -> its last words, of those that have said something whole. Does not communicate."""
    return _read(run_folder, range(world_size))


def _read(run_folder: Path, ranks: Iterable[int]) -> dict[int, Beat]:
    found = {}
    for rank in ranks:
        try:
            found[rank] = Beat(**json.loads(beat_path(run_folder, rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # never written, or damaged: no word
            continue
    return found


def beat_path(run_folder: Path, rank: int) -> Path:
    """Where `rank` writes."""
    return run_folder / FOLDER / f"rank_{rank:05d}"


def behind(beats: dict[int, Beat], world_size: int) -> list[int]:
    """Ranks that have completed fewer phases than the foremost, and those that said nothing at all."""
    most = max((beat.count for beat in beats.values()), default=0)
    return [rank for rank in range(world_size) if rank not in beats or beats[rank].count < most]


class Watchdog:
    """A thread that writes this rank's beat and, when a step takes too long, says which ranks are behind.

    folder: of the run. teachers: ranks beyond world_size that hold nothing but the teacher; they go through phases of
    their own, and what they did last is told besides. warn_s, exit_s: guard.stall_warn_s and guard.stall_exit_s.
    give_up: called with one line before the process is ended by `end`; its OSError is passed over, and if it hangs the
    process ends GRACE_S later. As a context manager it watches inside the block. Never communicates.
    """

    def __init__(
        self,
        pulse: Pulse,
        folder: Path,
        world_size: int,
        *,
        teachers: Sequence[int] = (),
        warn_s: float,
        exit_s: float | None = None,
        give_up: Callable[[str], None] = lambda why: None,
        end: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._pulse, self._folder, self._world_size, self._teachers = pulse, folder, world_size, list(teachers)
        self._warn_s, self._exit_s = warn_s, exit_s
        self._give_up, self._end, self._clock, self._wall = give_up, end, clock, wall
        self._every = min(max(SHORTEST_S, warn_s / 4), LONGEST_S)
        self._since = pulse.since
        self._warn_at = warn_s
        self._written: Beat | None = None
        self._can_write = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kdtrain-watchdog", daemon=True)
        self._last_resort = threading.Thread(target=self._end_anyway, name="kdtrain-watchdog-end", daemon=True)

    def __enter__(self) -> Watchdog:
        self.look()
        self._thread.start()
        if self._exit_s is not None:
            self._last_resort.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._write(self._pulse.beat)

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.look()

    def _end_anyway(self) -> None:
        """In a thread that touches no file and says nothing: either may be what hangs, and `look` with it."""
        assert self._exit_s is not None
        while not self._stop.wait(self._every):
            if self._clock() - self._pulse.since >= self._exit_s + GRACE_S:
                self._end(EXIT_OTHER)

    def look(self) -> None:
        """Write the beat if it is new; warn if the present work has taken too long, end the process if far too long."""
        self._write(self._pulse.beat)
        if self._pulse.since != self._since:
            self._since, self._warn_at = self._pulse.since, self._warn_s
        waited = self._clock() - self._since
        if self._exit_s is not None and waited >= self._exit_s:
            self._exit(waited)
        elif waited >= self._warn_at:
            self._warn_at = 2 * max(waited, self._warn_at)  # once more when the wait has doubled
            LOGGER.warning("stall    %s", self._report(waited))

    def _write(self, beat: Beat) -> None:
        if beat == self._written:
            return
        path = beat_path(self._folder, beat.rank)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
            os.replace(temporary, path)  # not synced: it is for readers now, not after a power cut
            self._written, self._can_write = beat, True
        except OSError as error:
            if self._can_write:
                text = "stall    cannot write %s: %s; others do not see where this rank is"
                LOGGER.warning(text, path, error.strerror)
            self._can_write = False

    def _report(self, waited: float) -> str:
        beat, beats = self._pulse.beat, read_beats(self._folder, self._world_size)
        late = behind(beats, self._world_size)
        text = f"rank {beat.rank}: step {beat.step} has taken {waited:.0f} s ({beat.now or 'between phases'})"
        if self._teachers:
            words = _read(self._folder, self._teachers)
            text += f"; teachers: {', '.join(_last_words(r, words.get(r), self._wall()) for r in self._teachers[:8])}"
        if not late:
            return text + "; all ranks have completed the same phases"
        told = [_last_words(rank, beats.get(rank), self._wall()) for rank in late[:8]]
        more = f" and {len(late) - 8} more" if len(late) > 8 else ""
        return f"{text}; behind: {', '.join(told)}{more}"

    def _exit(self, waited: float) -> None:
        late = f"{self._report(waited)}\n  why: guard.stall_exit_s = {self._exit_s:g} s have passed"
        beats, now = read_beats(self._folder, self._world_size), self._wall()
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
        with contextlib.suppress(OSError):  # whoever read what this process says may be gone
            print(f"kdtrain: {late}", format_table(rows) if rows else "", sep="\n", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        with contextlib.suppress(OSError):  # a full disk, or one that is gone
            self._give_up(late.partition("\n")[0])
        self._end(EXIT_OTHER)


def _last_words(rank: int, beat: Beat | None, now: float) -> str:
    if beat is None:
        return f"rank {rank} (no word)"
    doing = f", now in {beat.now}" if beat.now else ""
    ago = f"{now - beat.time:.0f} s ago"
    return f"rank {rank} on {beat.host} (completed {beat.done} of step {beat.done_step} {ago}{doing})"
