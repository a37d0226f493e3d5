"""The lock of a run folder: a file LOCK that names its holder and whose modification time the holder renews.

A killed holder is detected at once on its own host, by its process id, and on any host if the LOCK is of an earlier
start of the same Slurm job. Otherwise the LOCK is stale when its time has not changed for its lease. Clocks of hosts
are never compared: the process that tries to take the lock waits for a change.
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
"""Times that a lock is touched per lease."""


def take_lock(folder: Path, lease_s: float | None) -> dict[str, Any]:
    """Create folder/LOCK for this process and return its content.

    lease_s: the lock's lease, which a `LockKeeper` renews; None: no lease. A lock whose holder has ended is removed,
    with a warning; detecting that may take the lock's lease. Raises ConfigError when another run holds the folder,
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
    with _serialised(folder):
        if path.exists():
            held = read_lock(path)
            if held is not None and held != expired and not _is_stale(held, mine):
                raise _in_use(path, held)
            LOGGER.warning("%s was left by a process that has ended; taking over", path)
            _remove(path, held)
        _create(path, mine)
    return mine


def read_lock(path: Path) -> dict[str, Any] | None:
    """The lock's content; None if there is no lock or it is incomplete, as after a kill of its writer."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {"host", "pid", "started", "since"} <= set(found) else None


def release_lock(folder: Path, mine: dict[str, Any]) -> None:
    """Remove folder/LOCK if it is this process's; logs a warning if it cannot be removed."""
    path = folder / NAME
    if read_lock(path) == mine:
        try:
            path.unlink()
        except OSError as error:
            LOGGER.warning("%s cannot be removed: %s", path, error.strerror)


class LockKeeper:
    """A thread that renews the lease of a lock, and ends the process if another process has taken the lock over.

    That happens to a process that was suspended for longer than its lease: two runs must not write into one folder. A
    lock that was removed by hand is created again. As a context manager it runs inside the block. lost: called with one
    line before the process ends.
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
        """Touch the lock if this process still holds it; end the process if another one does."""
        held = None
        try:
            if not self._path.exists():
                with contextlib.suppress(ConfigError):  # another process was faster: detected below
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
            self._end_process(held)

    def _end_process(self, held: dict[str, Any]) -> None:
        why = f"{self._path} was taken over by process {held['pid']} on {held['host']} since {held['since']}"
        with contextlib.suppress(OSError):  # stderr may be closed; the process must end anyway
            print(
                f"kdtrain: {why}\n  why: it was not touched for run.lock_lease_s = {self._mine['lease_s']:g} s, "
                "and two runs in one folder would overwrite each other's checkpoints\n"
                "  fix: keep the other run; set run.lock_lease_s higher if this host was suspended for long",
                file=sys.stderr,
                flush=True,
            )
            self._lost(why)
        self._end(EXIT_OTHER)


def _watch(path: Path, mine: dict[str, Any]) -> dict[str, Any] | None:
    """The lock if its lease has expired and nothing else shows that it is stale; None if there is no such lock.

    Raises ConfigError as soon as the lock is touched.
    """
    held = read_lock(path)
    if held is None or _is_stale(held, mine) or _is_near(held, mine) or held.get("lease_s") is None:
        return None
    lease_s, seen, began = float(held["lease_s"]), _touched(path), time.monotonic()
    LOGGER.warning(
        "%s is held by process %s on %s; waiting up to %g s to see whether it is renewed",
        *(path, held["pid"], held["host"], lease_s),
    )
    while time.monotonic() - began < lease_s:
        time.sleep(min(1.0, lease_s / TOUCHES))
        now = _touched(path)
        if now is None:  # released meanwhile
            return None
        if now != seen:
            raise _in_use(path, held)
    return held


def _touched(path: Path) -> int | None:
    """Modification time of the lock, None without a lock. Opens it so that network file systems query the server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _is_near(held: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether the holder's process, if it runs, is visible to this process."""
    return held["host"] == mine["host"] and held.get("processes", mine["processes"]) == mine["processes"]


def _is_stale(held: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether the holder has certainly ended, without waiting.

    On this host: no such process, or another process now has its id. On any host: the holder was an earlier start of
    this Slurm job.
    """
    if _is_near(held, mine):
        return _start_time(held["pid"]) is None or _start_time(held["pid"]) != held["started"]
    return held.get("job") is not None and held["job"] == mine["job"] and held.get("restart", 0) < mine["restart"]


def _in_use(path: Path, held: dict[str, Any]) -> ConfigError:
    return ConfigError(
        f"the run folder {path.parent} is in use by process {held['pid']} on {held['host']} since {held['since']}\n"
        "  why: two runs in one folder would overwrite each other's checkpoints\n"
        f"  fix: choose another run.name; or, if that process has ended, remove {path}"
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
    if read_lock(path) != mine:  # another host saw it while it was empty and took it over
        raise _taken(path)


@contextlib.contextmanager
def _serialised(folder: Path) -> Iterator[None]:
    """Serialise `take_lock` between the processes of this host, where the file system supports locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no flock; O_EXCL still holds
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _process_space() -> str:
    """Boot id and process namespace: within them a process id identifies one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux, or no /proc: only the host's name is compared
        return "?"


def _start_time(pid: int) -> str | None:
    """Start time of process `pid` in the kernel's units; "?" if unknown, None if there is no such process."""
    try:
        with contextlib.suppress(PermissionError):  # it runs and belongs to another user
            os.kill(pid, 0)
    except ProcessLookupError:
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return "?"
    # The name may contain spaces and brackets: count field 22 from its end. A zombie holds no lock any more.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
