"""Folders that are being written: named and locked so that what a killed process left behind is told from the rest.

The name holds host and process; a lock of the folder itself, which ends with the process, tells those apart whom the
name cannot, such as two containers with one host name. Where folders cannot be locked the name decides.
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

from kdtrain.files import is_running
from kdtrain.log import LOGGER

_NAME = re.compile(r"\..+\.writing\.(?P<host>.+)\.(?P<process>[1-9]\d*)\.[0-9a-f]{8}")
_OLD_NAME = re.compile(r"\..+\.writing\.[0-9a-f]{8}")


def make_unfinished(folder: Path) -> tuple[Path, int]:
    """A new hidden folder beside `folder`, to be renamed to it, and the descriptor that holds its lock.

    Closing the descriptor gives the lock back. Raises OSError if the folder cannot be made.
    """
    name = f".{folder.name}.writing.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    made = folder.with_name(name)
    made.mkdir(parents=True)
    descriptor = os.open(made, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network file systems lock no folders
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return made, descriptor


def remove_abandoned(parent: Path) -> None:
    """Remove the unfinished folders in `parent` whose process on this machine is gone, and say so.

    Those of other machines may still be written to; of names without a process nobody can tell: they stay.
    """
    for path in sorted(parent.glob(".*.writing.*")) if parent.is_dir() else []:
        if _OLD_NAME.fullmatch(path.name):
            LOGGER.warning("prepare  %s is unfinished; remove it if nothing writes to it", path)
        elif path.is_dir() and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
            if path.exists():
                LOGGER.warning("prepare  %s, which a killed preparation left behind, cannot be removed", path)
            else:
                LOGGER.info("prepare  removed %s, which a killed preparation left behind", path)


def _is_abandoned(path: Path) -> bool:
    found = _NAME.fullmatch(path.name)
    if found is None or found["host"] != socket.gethostname() or is_running(int(found["process"])):
        return False
    with _descriptor(path) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no locks here
            return True
    return True


@contextlib.contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
