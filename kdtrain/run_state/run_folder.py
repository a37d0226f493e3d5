"""A run's folder: configuration, environment, status, and a lock against two runs in one folder.

<output_dir>/<name>/
  config.yaml  config.origin.txt  environment.json    configuration, origin of each key, versions and machines
  STATUS                                              running | done | failed | stopped, and the reason
  LOCK                                                the process that writes here; absent when there is none
  console.log  metrics.jsonl  checkpoints/  ...       written by other modules
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from kdtrain.errors import ConfigError, OutputError, RunStopped
from kdtrain.files import write_atomic
from kdtrain.log import LOGGER
from kdtrain.run_state.lock import LockKeeper, release_lock, take_lock

State = Literal["running", "done", "failed", "stopped"]


def read_status(folder: Path) -> tuple[State, str] | None:
    """(state, reason) of the run in `folder`; None if no run was started there. Raises ConfigError if unreadable."""
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

    As a context manager it sets the final state unless one was set: done, or, if the block raises, stopped (RunStopped)
    or failed, with the error's first line. If that cannot be written it logs a warning, and the block's error passes.
    """

    def __init__(self, path: Path, lock: dict[str, Any]) -> None:
        self.path = path
        self._lock = lock
        self._state: State = "running"

    @classmethod
    def open(cls, output_dir: str | os.PathLike[str], name: str, *, lease_s: float | None = None) -> RunFolder:
        """Create <output_dir>/<name> or take up an existing one, lock it, and mark it running.

        A lock left by a process that has ended is removed, with a warning. lease_s: the lock's lease, renewed by
        `lock_kept`. Raises ConfigError if the folder cannot be written or another run holds it, and then leaves no
        lock.
        """
        if name in ("", ".", "..") or Path(name).name != name:
            raise ConfigError(
                f"run.name = {name!r} cannot name a folder\n"
                "  why: the run is kept in <run.output_dir>/<run.name>\n  fix: use one name without slashes"
            )
        path = Path(output_dir) / name
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path, lease_s)
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
        """The state in STATUS."""
        return self._state

    def set_status(self, state: State, reason: str = "") -> None:
        """Replace STATUS, atomically, by one line: the state, two spaces, the reason's first line."""
        first = reason.strip().splitlines()[0] if reason.strip() else ""
        write_atomic(self.path / "STATUS", f"{state}  {first}".rstrip() + "\n")
        self._state = state

    def write_config(self, config_yaml: str, origin: str) -> None:
        """Write the resolved configuration and the origin of each key.

        A resumed run replaces both; the former ones are kept as config.yaml.before and config.origin.txt.before if they
        differ.
        """
        for name, text in (("config.yaml", config_yaml), ("config.origin.txt", origin)):
            path = self.path / name
            if path.exists() and path.read_text(encoding="utf-8") != text:
                os.replace(path, path.with_name(name + ".before"))
            write_atomic(path, text)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write `environment`, versions and machines, as environment.json."""
        write_atomic(self.path / "environment.json", json.dumps(environment, indent=2, sort_keys=True) + "\n")

    def close(self) -> None:
        """Release the lock, unless another process has taken it over. Logs a warning if it cannot be removed; the next
        run detects that its holder has ended.
        """
        release_lock(self.path, self._lock)

    def lock_kept(self) -> LockKeeper:
        """A context manager that renews the lock's lease; the process ends if another one has taken the lock over."""
        return LockKeeper(self.path, self._lock)

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
            LOGGER.warning("%s could not be changed from running: %s", self.path / "STATUS", refused.strerror)

    def mark_done(self) -> None:
        """Mark the run done. Raises OutputError if that cannot be written."""
        try:
            self.set_status("done")
        except OSError as error:
            raise OutputError.of(self.path / "STATUS", error) from error
