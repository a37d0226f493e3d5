"""Write a folder of records (`kdtrain.stores.record_folder`) so that a kill at any byte is resumed to the same folder.

The bytes of a block are on disk before its line of the journal is, so the journal names only what is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from kdtrain.errors import ConfigError, DataError
from kdtrain.files import sync, write_synced
from kdtrain.log import LOGGER
from kdtrain.stores.checksums import sha256_of
from kdtrain.stores.files import StoredFile
from kdtrain.stores.journal import Block, Journal, journal_line
from kdtrain.stores.record_folder import (
    ENTRY,
    IDENTITY,
    LARGEST_KEY,
    MANIFEST,
    check_identity,
    checked_bytes,
    checksum,
    journal_name,
    read_at,
    read_identity,
    read_journal,
    read_journals,
    shard_name,
)


class ShardWriter:
    """Writes shard number `shard` of `shards`; each is filled by one process, in any order or at the same time.

    A context manager. It continues after the blocks that are on disk, `blocks`; what a kill left behind them is cut
    off. With the same blocks in the same order the folder is the same, byte for byte, however often a process was
    killed, and whichever process writes which shard. Does not communicate: `commit` is called by one process, when all
    shards are finished.

    identity: what the records are made from, JSON-able. Raises StoreMismatch if the folder has another identity or
    number of shards, ConfigError if another process writes this shard, DataError for damage, and if the disk is full;
    all `blocks` are on disk then and stay.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], shard: int = 0, shards: int = 1) -> None:
        if not 0 <= shard < shards:
            raise ValueError(f"shard {shard} of {shards}")
        self.folder, self._name = folder, shard_name(shard)
        self._journal = self._data = -1
        mine = {"identity": dict(identity), "shards": shards}
        with _writing(folder):
            _make(folder)
            _write_identity(folder, checked_bytes(mine), f"{shard:05d}")
            about = read_identity(folder)
            check_identity(folder, {name: about[name] for name in mine}, mine)
            try:
                self._journal = os.open(folder / journal_name(shard), os.O_RDWR | os.O_CREAT, 0o644)
                self._lock()
                self._data = os.open(folder / self._name, os.O_RDWR | os.O_CREAT, 0o644)
                sync(folder)
                self._known = read_journal(folder, shard)
                self._digest = self._digest_of_blocks()
                self._cut_off()
            except BaseException:
                self.close()
                raise

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks on disk, in the order of writing."""
        return self._known.blocks

    @property
    def finished(self) -> bool:
        """Whether `finish` was called, by this process or an earlier one."""
        return self._known.end is not None

    def append(self, first: int, records: Sequence[bytes]) -> None:
        """Write one block, the records of the keys first, first + 1, ..., and return when it is on disk.

        Raises DataError if it cannot be written; what is in `blocks` stays, and the writer can be used again.
        """
        if self.finished or not records or not 0 <= first <= LARGEST_KEY + 1 - len(records):
            raise ValueError(f"{self._name} is finished, or {len(records)} records from key {first} are no block")
        entries = [
            ENTRY.pack(stop, checksum(first + number, record))
            for number, (record, stop) in enumerate(zip(records, accumulate(map(len, records)), strict=True))
        ]
        data = b"".join([*entries, *records])
        block = Block(first, len(records), self._known.shard_size, len(data), hashlib.sha256(data).hexdigest())
        with self._undone_on_error():
            _write(self._data, data, block.offset)
            self._log(block)
        self._digest.update(data)

    def finish(self) -> None:
        """Declare the shard finished. Does nothing if it is already."""
        if not self.finished:
            with self._undone_on_error():
                self._log(StoredFile(self._name, self._known.shard_size, self._digest.hexdigest()))

    def close(self) -> None:
        """Release files and lock. What was appended is on disk already."""
        for descriptor in (self._data, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._journal = -1

    def _log(self, entry: Block | StoredFile) -> None:
        _write(self._journal, journal_line(entry), self._known.size)
        self._known = self._known.plus(entry)

    @contextlib.contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        try:
            with _writing(self.folder):
                yield
        except DataError:
            with contextlib.suppress(OSError):  # the next process that opens the shard cuts it off as well
                self._cut_off()
            raise

    def _cut_off(self) -> None:
        """Remove what is behind the last block and its line."""
        os.ftruncate(self._journal, self._known.size)
        os.ftruncate(self._data, self._known.shard_size)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{self.folder / self._name} is being written by another process\n"
                "  fix: wait for its end, or name a new folder"
            ) from error
        except OSError as error:
            LOGGER.warning("%s cannot be locked (%s): let one process write it", self.folder, error.strerror)

    def _digest_of_blocks(self) -> Any:
        """sha256 of an unfinished shard so far. Raises DataError if a block is damaged."""
        digest = hashlib.sha256()
        for block in () if self.finished else self.blocks:
            data = read_at(self._data, block.size, block.offset)
            if hashlib.sha256(data).hexdigest() != block.sha256:
                raise DataError(
                    f"{self.folder / self._name} is damaged: the checksum of the block at byte {block.offset} is "
                    "wrong\n  fix: remove this shard and its journal, then run again: it is made anew"
                )
            digest.update(data)
        return digest

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def commit(folder: Path) -> None:
    """Write manifest.json, with which the folder is finished. One process calls it, when all shards are.

    Reads identity and journals; of the shards the sizes. Raises DataError if a shard is not finished or shorter than
    its journal says, or if two blocks hold the same key.
    """
    with _writing(folder):
        journals = read_journals(folder, read_identity(folder)["shards"])
        ends = [journal.end for journal in journals]
        if None in ends:
            unfinished = [shard for shard, end in enumerate(ends) if end is None]
            raise DataError(
                f"{folder} is not finished: of {len(ends)} shards these are not: {unfinished}\n"
                "  fix: run what writes it again; it continues where it stopped"
            )
        _check_keys(folder, journals)
        files = [end for end in ends if end is not None]
        for name in (IDENTITY, *(journal_name(shard) for shard in range(len(ends)))):
            files.append(StoredFile(name, (folder / name).stat().st_size, sha256_of(folder / name)))
        _replace(folder / MANIFEST, checked_bytes({"files": [asdict(file) for file in files]}), "commit")


def _check_keys(folder: Path, journals: Sequence[Journal]) -> None:
    """Raise DataError if two blocks hold the same key."""
    found = [(block, shard) for shard, journal in enumerate(journals) for block in journal.blocks]
    found.sort(key=lambda entry: (entry[0].first, entry[1]))
    for (before, one), (block, other) in pairwise(found):
        if block.first < before.first + before.count:
            raise DataError(
                f"{folder}: {shard_name(one)} and {shard_name(other)} both have the key {block.first}\n"
                "  fix: give each shard keys of its own, and make the records again"
            )


def _make(folder: Path) -> None:
    """Make the folder, and those above it that are missing, and flush their names to disk."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync(path.parent)


def _write_identity(folder: Path, data: bytes, unique: str) -> None:
    """Write identity.json if the folder has none. Raises DataError if it has shards without one."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        # of writers that begin at the same time, the second must see the identity of the first, not replace it
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(lock, fcntl.LOCK_EX)
        begun = next(folder.glob("shard_*"), None)  # before the next line: an identity is older than its shards
        if not (folder / IDENTITY).exists():
            if begun is not None:
                raise DataError(
                    f"{folder} is damaged: it has {begun.name}, but no {IDENTITY}\n"
                    "  why: what its records were made from is unknown\n"
                    "  fix: copy the folder again, or make the records again in a new one"
                )
            _replace(folder / IDENTITY, data, unique)
        _temporary(folder / IDENTITY, unique).unlink(missing_ok=True)  # of a killed process
    finally:
        os.close(lock)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset` and flush it to disk."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
    os.fsync(descriptor)


def _temporary(path: Path, unique: str) -> Path:
    return path.with_name(f".{path.name}.{unique}")


def _replace(path: Path, data: bytes, unique: str) -> None:
    """Write a file that is there as a whole or not at all; what a kill leaves is overwritten by the next call."""
    write_synced(_temporary(path, unique), data)
    os.replace(_temporary(path, unique), path)
    sync(path.parent)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: writing failed: {error.strerror}\n  why: blocks written before are kept\n"
            "  fix: free some space or check permissions, then run again: it continues where it stopped"
        ) from error
