"""Read a folder of records, bytes by key, while it is written or afterwards (`kdtrain.stores.record_writer`).

    identity.json         what the records were made from, and the number of shards
    shard_00000.bin       blocks: a table of the ends and CRC-32s of a few records, then their bytes
    shard_00000.journal   a line for each block of the shard that is on disk (`kdtrain.stores.journal`)
    manifest.json         size and sha256 of all of these; written when every shard is finished

Keys are whole numbers in [0, 2^63), such as those of `kdtrain.stores.keys`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from kdtrain.errors import DataError, StoreMismatch
from kdtrain.stores.files import StoredFile
from kdtrain.stores.journal import DAMAGED_FIX, Block, Journal, parse_journal
from kdtrain.stores.keys import first_difference

FORMAT, VERSION = "kdtrain-records", 1
IDENTITY, MANIFEST = "identity.json", "manifest.json"
LARGEST_KEY = (1 << 63) - 1
ENTRY = struct.Struct("<QI")
"""A record in the table of its block: where its bytes end, counted from the end of the table, and its CRC-32."""
OPEN_SHARDS = 128
"""Shards that a reader holds open at a time."""


def shard_name(shard: int) -> str:
    """Name of a shard's file."""
    return f"shard_{shard:05d}.bin"


def journal_name(shard: int) -> str:
    """Name of a shard's journal."""
    return f"shard_{shard:05d}.journal"


def checksum(key: int, record: bytes) -> int:
    """CRC-32 of a key and its record, so that a record of another key is damage."""
    return zlib.crc32(record, zlib.crc32(struct.pack("<Q", key)))


class RecordFolder:
    """Random access to the records of a folder. Thread-safe. Use `open` to make one. Does not communicate.

    identity: what the records were made from. complete: whether the folder is finished; if not, it has the blocks that
    were on disk when it was opened. journals: of each shard, with its blocks and whether it is finished.
    """

    def __init__(self, path: Path, identity: dict[str, Any], journals: list[Journal], *, complete: bool) -> None:
        self.path, self.identity, self.journals, self.complete = path, identity, journals, complete
        found = [(block.first, shard, block) for shard, journal in enumerate(journals) for block in journal.blocks]
        self._blocks = sorted(found, key=lambda entry: entry[:2])
        self._firsts = [first for first, _, _ in self._blocks]
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(lambda shard: _Open(path / shard_name(shard)))

    @classmethod
    def open(cls, folder: str | Path, identity: Mapping[str, Any] | None = None) -> RecordFolder:
        """Open a folder, finished or not. identity: what the records must have been made from; None: anything.

        Compares the sizes of a finished folder's files, and the checksums of all but the shards (see `verify`). Raises
        StoreMismatch, naming the first field that differs, and DataError for a damaged or missing file.
        """
        path = Path(folder)
        with _reading(path):
            about = read_identity(path)
            if identity is not None:
                check_identity(path, about["identity"], identity)
            files = _read_manifest(path) if (path / MANIFEST).exists() else None
            for file in files or ():
                _check_file(path, file, content=not file.name.endswith(".bin"))
            return cls(path, about["identity"], read_journals(path, about["shards"]), complete=files is not None)

    def __len__(self) -> int:
        """Number of records."""
        return sum(block.count for _, _, block in self._blocks)

    def __contains__(self, key: int) -> bool:
        """Whether there is a record of this key."""
        return self._find(key) is not None

    def __getitem__(self, key: int) -> bytes:
        """The record of a key: two reads, of no other record's bytes. KeyError without one, DataError for damage."""
        found = self._find(key)
        if found is None:
            state = "" if self.complete else f", which is not finished: {len(self)} records so far"
            raise KeyError(f"no record of key {key} in {self.path}{state}")
        shard, block = found
        number, table = key - block.first, block.count * ENTRY.size
        before = 1 if number else 0  # a record begins where the one before it ends
        entries = self._read(shard, block.offset + (number - before) * ENTRY.size, (1 + before) * ENTRY.size)
        start = ENTRY.unpack_from(entries)[0] if before else 0
        stop, expected = ENTRY.unpack_from(entries, before * ENTRY.size)
        inside = start <= stop <= block.size - table
        record = self._read(shard, block.offset + table + start, stop - start) if inside else b""
        if not inside or checksum(key, record) != expected:
            raise self._damaged(shard, f"the checksum of the record of key {key} is wrong")
        return record

    def _find(self, key: int) -> tuple[int, Block] | None:
        place = bisect_right(self._firsts, key) - 1
        if place < 0 or key >= self._firsts[place] + self._blocks[place][2].count:
            return None
        return self._blocks[place][1:]

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        with _reading(self.path):
            file = self._shard(shard)  # held until the end of the read: it may be dropped from the cache meanwhile
            found = read_at(file.descriptor, size, offset)
        if len(found) < size:
            raise self._damaged(shard, f"it ends at byte {offset + len(found)}, inside a block")
        return found

    def _damaged(self, shard: int, what: str) -> DataError:
        return DataError(f"{self.path / shard_name(shard)} is damaged: {what}\n{DAMAGED_FIX}")

    def verify(self) -> None:
        """Read every byte: all blocks, and all files of a finished folder. DataError names the damaged file."""
        for _, shard, block in self._blocks:
            if hashlib.sha256(self._read(shard, block.offset, block.size)).hexdigest() != block.sha256:
                raise self._damaged(shard, f"the checksum of the block at byte {block.offset} is wrong")
        with _reading(self.path):
            for file in _read_manifest(self.path) if self.complete else ():
                _check_file(self.path, file, content=True)


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes of a file, fewer at its end. One system call returns at most 2 GiB. Raises OSError."""
    found = os.pread(descriptor, size, offset)
    while len(found) < size and (more := os.pread(descriptor, size - len(found), offset + len(found))):
        found += more
    return found


class _Open:
    """A file that is open as long as something refers to it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def read_identity(path: Path) -> dict[str, Any]:
    """identity.json of a folder, checked: identity and number of shards. Raises DataError, OSError."""
    if not (path / IDENTITY).is_file():
        raise DataError(f"{path} is not a folder of records: it has no {IDENTITY}\n  fix: name one, or make it")
    return read_checked(path / IDENTITY, ("identity", "shards"))


def check_identity(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise StoreMismatch, naming the first field that differs and both values, unless both are equal as JSON."""
    found = first_difference(dict(_leaves(there)), dict(_leaves(json.loads(json.dumps(here)))))
    if found is not None:
        raise StoreMismatch(
            f"the records in {path} differ in {found[0]}: {found[1]} there, {found[2]} here\n"
            "  why: they were made from something else than what they would be used with\n"
            "  fix: name the folder that was made for this, or make the records again in a new one"
        )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read_journals(path: Path, shards: int) -> list[Journal]:
    """The journal of each shard, an empty one for a shard that was not begun. Raises DataError, OSError."""
    return [read_journal(path, shard) for shard in range(shards)]


def read_journal(path: Path, shard: int) -> Journal:
    """The journal of a shard, with the entries whose bytes are in the shard."""
    file, data = path / journal_name(shard), path / shard_name(shard)
    content = file.read_bytes() if file.exists() else b""
    return parse_journal(content, str(file), data.stat().st_size if data.exists() else 0)


def checked_bytes(content: Mapping[str, Any]) -> bytes:
    """A small JSON file of this format with a checksum of its content."""
    content = {"format": FORMAT, "version": VERSION, **content}
    return (json.dumps({**content, "check": zlib.crc32(json.dumps(content).encode())}, indent=1) + "\n").encode()


def read_checked(file: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The content of a file that `checked_bytes` made, with these fields. Raises DataError, OSError."""
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{file} is damaged: {error}\n{DAMAGED_FIX}") from error
    check = found.pop("check", None)
    if found.get("format") == FORMAT and type(found.get("version")) is int and found["version"] > VERSION:
        raise DataError(
            f"{file}: format {FORMAT!r} version {found['version']}; this kdtrain reads up to version {VERSION}\n"
            "  fix: use the kdtrain that wrote it, or make the records again"
        )
    if check != zlib.crc32(json.dumps(found).encode()) or not {"format", *names} <= found.keys():
        raise DataError(f"{file} is damaged: its checksum is wrong\n{DAMAGED_FIX}")
    return found


def _read_manifest(path: Path) -> list[StoredFile]:
    return [StoredFile(**file) for file in read_checked(path / MANIFEST, ("files",))["files"]]


def _check_file(path: Path, file: StoredFile, *, content: bool) -> None:
    size = file.size_found(path)
    found = file.other_sha256(path) if content and size == file.size else None
    if size != file.size or found is not None:
        what = f"{size} bytes, {file.size}" if found is None else f"sha256 {found}, {file.sha256}"
        raise DataError(f"{path / file.name} is damaged: {what} in the manifest\n{DAMAGED_FIX}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror}\n{DAMAGED_FIX}") from error
