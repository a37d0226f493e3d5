"""A run's folder: what was asked, where it ran, how it ended, and a lock against two runs in one place.

<output_dir>/<name>/
  config.yaml  config.origin.txt  environment.json    what was asked, who set it, versions and machines
  STATUS                                              running | done | failed | stopped, and the reason
  LOCK                                                who is writing here; gone when nobody is
  console.log  metrics.jsonl  checkpoints/  ...       written by others
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from kdtrain.errors import ConfigError, OutputError, RunStopped
from kdtrain.log import LOGGER

State = Literal["running", "done", "failed", "stopped"]


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a kill at any moment, finds the old content or the new, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_status(folder: Path) -> tuple[State, str] | None:
    """(state, reason) of the run in `folder`; None if none ever started there. Raises ConfigError if unreadable."""
    path = folder / "STATUS"
    if not path.exists():
        return None
    state, _, reason = path.read_text(encoding="utf-8").strip().partition("  ")
    for known in ("running", "done", "failed", "stopped"):
        if state == known:
            return known, reason  # type: ignore[return-value]
    raise ConfigError(
        f"{path} begins with {state!r}, not with running, done, failed or stopped\n  fix: remove the file"
    )


class RunFolder:
    """An open run folder, held by this process until `close`. One rank opens it; others only need its path.

    As a context manager, unless a state was set, it ends as done; or if the block raises as stopped (RunStopped) or
    failed, with the error's first line. If that cannot be written, a warning says so and the block's error goes on.
    """

    def __init__(self, path: Path, lock: dict[str, Any]) -> None:
        self.path = path
        self._lock = lock
        self._state: State = "running"

    @classmethod
    def open(cls, output_dir: str | os.PathLike[str], name: str) -> RunFolder:
        """Create <output_dir>/<name> or take up an existing one, lock it, and mark it running.

        A lock left by a process that no longer lives is removed, with a warning. Raises ConfigError if the folder
        cannot be written or another run holds it; nothing is left behind then.
        """
        if name in ("", ".", "..") or Path(name).name != name:
            raise ConfigError(
                f"run.name = {name!r} cannot name a folder\n"
                "  why: the run is kept in <run.output_dir>/<run.name>\n  fix: use one name without slashes"
            )
        path = Path(output_dir) / name
        try:
            path.mkdir(parents=True, exist_ok=True)
            with _alone(path):
                lock = _take_lock(path)
            folder = cls(path, lock)
            try:
                folder.set_status("running", f"pid {lock['pid']} on {lock['host']} since {lock['since']}")
            except OSError:
                folder.close()
                raise
        except OSError as error:
            raise ConfigError(
                f"cannot write the run folder {path}: {error.strerror}\n"
                "  why: checkpoints and metrics go there (run.output_dir / run.name)\n"
                f"  fix: set run.output_dir to a folder you may write, or: chown/chmod {path.parent}"
            ) from error
        return folder

    @property
    def state(self) -> State:
        """What STATUS says."""
        return self._state

    def set_status(self, state: State, reason: str = "") -> None:
        """Replace STATUS, atomically, by one line: the state, two spaces, the reason's first line."""
        first = reason.strip().splitlines()[0] if reason.strip() else ""
        write_atomic(self.path / "STATUS", f"{state}  {first}".rstrip() + "\n")
        self._state = state

    def write_config(self, config_yaml: str, origin: str) -> None:
        """Keep the resolved configuration and where each key came from.

        A resumed run replaces both; the former ones stay as config.yaml.before and config.origin.txt.before if they
        differ.
        """
        for name, text in (("config.yaml", config_yaml), ("config.origin.txt", origin)):
            path = self.path / name
            if path.exists() and path.read_text(encoding="utf-8") != text:
                os.replace(path, path.with_name(name + ".before"))
            write_atomic(path, text)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Keep what `environment.describe` found, as environment.json."""
        write_atomic(self.path / "environment.json", json.dumps(environment, indent=2, sort_keys=True) + "\n")

    def close(self) -> None:
        """Give the lock back. Does nothing if another process has taken it over; a warning where it cannot be removed:
        the next run sees that its holder is gone.
        """
        lock = self.path / "LOCK"
        if _read_lock(lock) == self._lock:
            try:
                lock.unlink()
            except OSError as error:
                LOGGER.warning("%s cannot be removed: %s", lock, error.strerror)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._state == "running":
                if error is None:
                    self.set_status("done")
                else:
                    self._end_as("stopped" if isinstance(error, RunStopped) else "failed", error)
        finally:
            self.close()

    def _end_as(self, state: State, error: BaseException) -> None:
        try:
            self.set_status(state, f"{type(error).__name__}: {error}")
        except OSError as refused:  # the error itself matters more
            LOGGER.warning("%s still says running: %s", self.path / "STATUS", refused.strerror)

    def finish(self) -> None:
        """Mark the run done. Raises OutputError if that cannot be written."""
        try:
            self.set_status("done")
        except OSError as error:
            raise OutputError.of(self.path / "STATUS", error) from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Serialise the taking of locks between the processes of this host, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no flock; O_EXCL below still holds
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _take_lock(folder: Path) -> dict[str, Any]:
    path = folder / "LOCK"
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if path.exists():
        held = _read_lock(path)
        if not _is_stale(held, mine):
            assert held is not None
            raise ConfigError(
                f"the run folder {folder} is in use by process {held['pid']} on {held['host']} since {held['since']}\n"
                "  why: two runs in one folder would overwrite each other's checkpoints\n"
                f"  fix: choose another run.name; or, if that process is gone, remove {path}"
            )
        LOGGER.warning("%s was left by a process that is gone; taking over", path)
        path.unlink()
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError as error:  # another host was faster
        raise ConfigError(
            f"the run folder {folder} was taken by another run just now\n  fix: choose another run.name"
        ) from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(mine) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return mine


def _read_lock(path: Path) -> dict[str, Any] | None:
    """The lock's content; None if there is none or its writer died before it was whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {"host", "pid", "started", "since"} <= set(found) else None


def _is_stale(held: dict[str, Any] | None, mine: dict[str, Any]) -> bool:
    """Whether the holder is certainly gone.

    On this host: no such process, or its number is another process's now. On any host: the holder was an earlier
    start of this very Slurm job.
    """
    if held is None:
        return True
    if held["host"] == mine["host"]:
        return _start_time(held["pid"]) is None or _start_time(held["pid"]) != held["started"]
    return held.get("job") is not None and held["job"] == mine["job"] and held.get("restart", 0) < mine["restart"]


def _start_time(pid: int) -> str | None:
    """When process `pid` started, as the kernel counts it; "?" where that is unknown, None if there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it lives, and is somebody else's
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return "?"
    # the name may hold spaces and brackets; field 22 counts from after it. A zombie holds nothing any more.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
