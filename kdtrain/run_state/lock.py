"""The lock of a run folder: a file LOCK that names its holder and shows, by its time, that the holder lives.

A holder that was killed is recognised at once on its own host, by its process; on any host by the LOCK of an earlier
start of the same Slurm job; and elsewhere by a LOCK that nobody has touched for as long as it promises (its lease).
Clocks are never compared: whoever wants the folder watches for a change.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from kdtrain.errors import EXIT_OTHER, ConfigError
from kdtrain.log import LOGGER

NAME = "LOCK"
TOUCHES = 6
"""How often a lock is touched in the time it promises."""


def take_lock(folder: Path, lease_s: float | None) -> dict[str, Any]:
    """Make folder/LOCK for this process; what is in it.

    lease_s: what the lock promises, for a `LockKeeper` to keep; None: nothing. A lock whose holder is gone is removed,
    with a warning; to find that out may take that lock's lease. Raises ConfigError when another run holds the folder,
    OSError when it cannot be written.
    """
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "processes": _process_space(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "lease_s": lease_s,
    }
    path = folder / NAME
    expired = _watch(path, mine)
    with _alone(folder):
        if path.exists():
            held = read_lock(path)
            if held is not None and held != expired and not _is_stale(held, mine):
                raise _in_use(path, held)
            LOGGER.warning("%s was left by a process that is gone; taking over", path)
            _remove(path, held)
        _create(path, mine)
    return mine


def read_lock(path: Path) -> dict[str, Any] | None:
    """The lock's content; None if there is none or its writer died before it was whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {"host", "pid", "started", "since"} <= set(found) else None


def give_back(folder: Path, mine: dict[str, Any]) -> None:
    """Remove folder/LOCK unless it is another's; a warning where it cannot be removed."""
    path = folder / NAME
    if read_lock(path) == mine:
        try:
            path.unlink()
        except OSError as error:
            LOGGER.warning("%s cannot be removed: %s", path, error.strerror)


class LockKeeper:
    """A thread that touches a lock while its holder lives, and ends the process when another has taken the lock over.

    That happens to a holder that stood still for longer than its lease: two runs must not write into one folder. A
    lock that somebody removed by hand is put back. As a context manager it works inside the block. lost: called with
    one line before the process ends.
    """

    def __init__(
        self,
        folder: Path,
        mine: dict[str, Any],
        *,
        lost: Callable[[str], None] = lambda why: None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._path, self._mine, self._lost, self._end = folder / NAME, mine, lost, end
        self._can_touch = True
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> LockKeeper:
        if self._mine["lease_s"] is not None:
            self._thread = threading.Thread(target=self._keep, name="kdtrain-lock", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _keep(self) -> None:
        while not self._stop.wait(self._mine["lease_s"] / TOUCHES):
            self.look()

    def look(self) -> None:
        """Touch the lock if it is still this process's; end the process if it is another's."""
        held = None
        try:
            if not self._path.exists():
                with contextlib.suppress(ConfigError):  # somebody else's is there by now: that is seen below
                    _create(self._path, self._mine)
            held = read_lock(self._path)
            if held == self._mine:
                os.utime(self._path)
            self._can_touch = True
        except OSError as error:
            if self._can_touch:
                LOGGER.warning(
                    "%s cannot be touched: %s; in %g s another run may take the folder over",
                    *(self._path, error.strerror, self._mine["lease_s"]),
                )
            self._can_touch = False
        if held is not None and held != self._mine:
            self._give_up(held)

    def _give_up(self, held: dict[str, Any]) -> None:
        why = f"{self._path} was taken over by process {held['pid']} on {held['host']} since {held['since']}"
        with contextlib.suppress(OSError):  # whoever read what this process says may be gone; it must end all the same
            print(
                f"kdtrain: {why}\n  why: it was not touched for run.lock_lease_s = {self._mine['lease_s']:g} s, "
                "and two runs in one folder would overwrite each other's checkpoints\n"
                "  fix: let the other run go on; set run.lock_lease_s higher if this host stood still for long",
                file=sys.stderr,
                flush=True,
            )
            self._lost(why)
        self._end(EXIT_OTHER)


def _watch(path: Path, mine: dict[str, Any]) -> dict[str, Any] | None:
    """The lock if it is one of which only its lease can tell, and that has run out; None if there is no such lock.

    Raises ConfigError as soon as the lock is touched.
    """
    held = read_lock(path)
    if held is None or _is_stale(held, mine) or _is_near(held, mine) or held.get("lease_s") is None:
        return None
    lease_s, seen, began = float(held["lease_s"]), _touched(path), time.monotonic()
    LOGGER.warning(
        "%s is held by process %s on %s; waiting up to %g s for a sign of life",
        *(path, held["pid"], held["host"], lease_s),
    )
    while time.monotonic() - began < lease_s:
        time.sleep(min(1.0, lease_s / TOUCHES))
        now = _touched(path)
        if now is None:  # given back while we watched
            return None
        if now != seen:
            raise _in_use(path, held)
    return held


def _touched(path: Path) -> int | None:
    """When the lock was last touched; None if it is gone. Opened, because network file systems then ask the server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _is_near(held: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether the holder's process, if it lives, is one that this process can see."""
    return held["host"] == mine["host"] and held.get("processes", mine["processes"]) == mine["processes"]


def _is_stale(held: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether the holder is certainly gone, without waiting.

    On this host: no such process, or its number is another process's now. On any host: the holder was an earlier
    start of this very Slurm job.
    """
    if _is_near(held, mine):
        return _start_time(held["pid"]) is None or _start_time(held["pid"]) != held["started"]
    return held.get("job") is not None and held["job"] == mine["job"] and held.get("restart", 0) < mine["restart"]


def _in_use(path: Path, held: dict[str, Any]) -> ConfigError:
    return ConfigError(
        f"the run folder {path.parent} is in use by process {held['pid']} on {held['host']} since {held['since']}\n"
        "  why: two runs in one folder would overwrite each other's checkpoints\n"
        f"  fix: choose another run.name; or, if that process is gone, remove {path}"
    )


def _taken(path: Path) -> ConfigError:
    return ConfigError(
        f"the run folder {path.parent} was taken by another run just now\n  fix: choose another run.name"
    )


def _remove(path: Path, held: dict[str, Any] | None) -> None:
    """Remove a stale lock, `held`. If another host was faster, ConfigError, and its lock stays."""
    aside = path.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}")
    try:
        os.rename(path, aside)
    except FileNotFoundError as error:
        raise _taken(path) from error
    found = read_lock(aside)
    if found != held:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
    if found != held:
        raise _taken(path)


def _create(path: Path, mine: dict[str, Any]) -> None:
    """Make the lock, `mine`. If another host was faster, ConfigError, and its lock stays."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError as error:  # another host was faster
        raise _taken(path) from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(mine) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if read_lock(path) != mine:  # while it was empty it looked left behind, and another host took it over
        raise _taken(path)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Serialise the taking of locks between the processes of this host, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no flock; O_EXCL still holds
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _process_space() -> str:
    """Which machine since which boot, and which container: where a process number means the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux, or no /proc: the host's name must do
        return "?"


def _start_time(pid: int) -> str | None:
    """When process `pid` started, as the kernel counts it; "?" where that is unknown, None if there is none."""
    try:
        with contextlib.suppress(PermissionError):  # it lives, and is somebody else's
            os.kill(pid, 0)
    except ProcessLookupError:
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return "?"
    # the name may hold spaces and brackets; field 22 counts from after it. A zombie holds nothing any more.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
