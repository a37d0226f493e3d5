"""A file of a folder as its manifest describes it: name, size, checksum."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from kdtrain.stores.checksums import sha256_of


@dataclass(frozen=True, slots=True)
class StoredFile:
    """name: inside its folder. size: in bytes. sha256: of the content, in hexadecimal."""

    name: str
    size: int
    sha256: str

    def size_found(self, folder: Path) -> int:
        """Bytes of the file in `folder`, without opening it. Raises OSError if there is no such file."""
        path = folder / self.name
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return path.stat().st_size

    def other_sha256(self, folder: Path) -> str | None:
        """The checksum of the file in `folder` if it is another one, else None. Reads every byte. Raises OSError."""
        found = sha256_of(folder / self.name)
        return None if found == self.sha256 else found
