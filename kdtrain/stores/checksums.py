"""sha256 of files, of files while they are written, and of settings."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


def sha256_of(path: Path) -> str:
    """Checksum of a file, in hexadecimal. Reads every byte. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(content: Any) -> str:
    """Checksum, in hexadecimal, of a JSON-able value; independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class ChecksummedFile:
    """A new file at `path`, of which size and sha256 are taken from the bytes that are written, not read back.

    A context manager; leaving it closes the file. Only `commit` flushes the file to disk: without it the content may
    be incomplete. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self.size = 0
        """Bytes written."""

    def write(self, data: memoryview | bytes) -> None:
        """Append all of `data`."""
        self._digest.update(data)
        self._file.write(data)
        self.size += memoryview(data).nbytes

    def commit(self) -> str:
        """Flush the file to disk, close it and return its sha256 in hexadecimal."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file; does nothing after `commit`. Errors are ignored: what was not committed is discarded."""
        with contextlib.suppress(OSError):  # on a full disk the flush of the last bytes fails again
            self._file.close()

    def __enter__(self) -> ChecksummedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
