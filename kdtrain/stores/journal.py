"""The journal of a shard of records: a line for each block that is on disk, so that a kill loses no block before it.

A line is the CRC-32 of its text, a space and JSON. A last line that is torn is as if it had never been written.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass

from kdtrain.errors import DataError
from kdtrain.stores.files import StoredFile

DAMAGED_FIX = "  fix: copy the folder again, or make it again"
LONGEST_LINE = 512
"""Bytes that no line reaches, whatever its numbers are."""


@dataclass(frozen=True, slots=True)
class Block:
    """Records of the consecutive keys [first, first + count): `size` bytes of the shard from `offset` on."""

    first: int
    count: int
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Journal:
    """blocks: in the order of writing. size: bytes of their lines. end: the finished shard, None while it grows."""

    blocks: tuple[Block, ...] = ()
    size: int = 0
    end: StoredFile | None = None

    @property
    def shard_size(self) -> int:
        """Bytes of the shard up to the end of the last block."""
        return self.blocks[-1].offset + self.blocks[-1].size if self.blocks else 0

    def plus(self, entry: Block | StoredFile) -> Journal:
        """The journal with one more line."""
        size = self.size + len(journal_line(entry))
        if isinstance(entry, StoredFile):
            return Journal(self.blocks, size, entry)
        return Journal((*self.blocks, entry), size)


def journal_line(entry: Block | StoredFile) -> bytes:
    """The line of a block or, the last one, of the finished shard."""
    text = json.dumps(asdict(entry)).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def parse_journal(content: bytes, where: str, shard_size: int) -> Journal:
    """The journal with this content, up to the first entry whose bytes are not in a shard of `shard_size` bytes.

    Raises DataError, naming the line, if one before the last is damaged, if a line does not begin where the one before
    it ends, as after two writers, or if the rest is too long to be a torn line.
    """
    blocks: list[Block] = []
    lines = content.split(b"\n")  # what follows the last line break is torn, or nothing
    size, filled, end = 0, 0, None
    for number, line in enumerate(lines[:-1]):
        check, _, text = line.partition(b" ")
        if check != b"%08x" % zlib.crc32(text):
            if number == len(lines) - 2 and not lines[-1]:
                break
            raise DataError(f"{where} is damaged: the checksum of line {number + 1} is wrong\n{DAMAGED_FIX}")
        found = json.loads(text)
        entry = StoredFile(**found) if "name" in found else Block(**found)
        if end is not None or (entry.size if isinstance(entry, StoredFile) else entry.offset) != filled:
            raise DataError(f"{where} is damaged: line {number + 1} does not follow the one before it\n{DAMAGED_FIX}")
        if isinstance(entry, StoredFile):
            end = entry
        elif entry.offset + entry.size > shard_size:
            break
        else:
            blocks.append(entry)
            filled = entry.offset + entry.size
        size += len(line) + 1
    if len(lines[-1]) > LONGEST_LINE:  # such as zeros: a writer would cut off the whole shard
        raise DataError(f"{where} is damaged: {len(lines[-1])} bytes at its end are no line\n{DAMAGED_FIX}")
    return Journal(tuple(blocks), size, end)
