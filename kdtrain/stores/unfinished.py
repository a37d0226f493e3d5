"""Hidden folders that one process fills and then renames, and the removal of those whose process was killed.

The folder's name holds host and process id. The process also holds a lock on the folder, which the kernel releases
when the process ends: it covers the cases in which the name is ambiguous, such as two containers with one host name.
On file systems that cannot lock folders the name alone decides.

Two other writers have folder names and rules of their own: a checkpoint, which the ranks of several hosts fill together
(`kdtrain.engine.commit`), and a folder that replaces another (`kdtrain.stores.folders.replacing_folder`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from kdtrain.files import is_running
from kdtrain.log import LOGGER
from kdtrain.stores.folders import publish

_NAME = re.compile(r"\..+\.writing\.(?P<host>.+)\.(?P<process>[1-9]\d*)\.[0-9a-f]{8}")
_NAME_WITHOUT_PROCESS = re.compile(r"\..+\.writing\.[0-9a-f]{8}")
"""Written by versions before the process was part of the name."""


class UnfinishedFolder:
    """A new hidden folder beside `folder`: fill `path`, then `publish` renames it to `folder`.

    A context manager; leaving it removes the folder unless it was published, and releases its lock. Raises OSError if
    the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        name = f".{folder.name}.writing.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self.path = folder.with_name(name)
        self.path.mkdir(parents=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def publish(self) -> None:
        """Rename to `folder`, which must not exist. Files must be on disk already. Raises OSError."""
        publish(self.path, self.folder)

    def close(self) -> None:
        """Remove what was not published and release the lock. Call once."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def __enter__(self) -> UnfinishedFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def remove_abandoned(parent: Path, log_label: str) -> None:
    """Remove the unfinished folders in `parent` whose process on this machine has ended; log each.

    Folders of other machines stay, since their processes may still write to them; so do those of the older naming,
    which has no process id. log_label: the first word of the log lines, such as "prepare".
    """
    for path in sorted(parent.glob(".*.writing.*")) if parent.is_dir() else []:
        if _NAME_WITHOUT_PROCESS.fullmatch(path.name):
            LOGGER.warning("%-8s %s is unfinished; remove it if nothing writes to it", log_label, path)
        elif path.is_dir() and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
            if path.exists():
                LOGGER.warning("%-8s %s, left by a killed process, cannot be removed", log_label, path)
            else:
                LOGGER.info("%-8s removed %s, left by a killed process", log_label, path)


def _is_abandoned(path: Path) -> bool:
    found = _NAME.fullmatch(path.name)
    if found is None or found["host"] != socket.gethostname() or is_running(int(found["process"])):
        return False
    with _descriptor(path) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # this file system cannot lock folders
            return True
    return True


@contextlib.contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
