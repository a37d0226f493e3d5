"""The .idx file of Megatron's indexed datasets: sizes, byte pointers and documents of the sequences in a .bin file.

Layout: magic, u64 version 1, u8 dtype code, u64 sequences n, u64 entries m of the document index, n int32 sizes in
tokens, n int64 byte pointers, m int64 indices of sequences that begin documents (the last is n).
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdtrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
"""Megatron's dtype codes."""
CODES: dict[Any, int] = {np.dtype(kind): code for code, kind in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class MegatronIndex:
    """A parsed .idx, memory-mapped. dtype of the .bin; sizes [n] int32; pointers [n] int64; documents [m]."""

    dtype: np.dtype[Any]
    sizes: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens in the .bin file."""
        return 0 if len(self.sizes) == 0 else int(self.pointers[-1]) // self.dtype.itemsize + int(self.sizes[-1])

    def sequence_at(self, byte: int) -> int:
        """The first sequence that begins at or after `byte` of the .bin file. Logarithmic, copies nothing."""
        return bisect_left(self.pointers, byte)

    def check(self, path: Path, *, probes: int | None = None) -> None:
        """Check that sequences follow each other without gap. probes: number of places to check; None: all.

        Raises DataError naming `path` and the first sequence that is wrong.
        """
        n = len(self.sizes)
        step = 1 if probes is None else max(1, n // probes)
        sizes, pointers = self.sizes[: n - 1 : step].astype(np.int64), self.pointers[: n - 1 : step]
        wrong = (sizes < 0) | (pointers + sizes * self.dtype.itemsize != self.pointers[1::step])
        if n and (self.pointers[0] != 0 or wrong.any() or self.sizes[-1] < 0):
            where = 0 if self.pointers[0] != 0 else int(np.argmax(wrong)) * step if wrong.any() else n - 1
            raise DataError(
                f"{path} is damaged: sequence {where} of {n} does not end where the next begins\n"
                "  fix: copy the store again, or prepare the corpus again"
            )


def read_index(path: Path) -> MegatronIndex:
    """Map an .idx file. Raises DataError if it is missing, of another format, truncated or inconsistent."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}\n  fix: prepare the corpus again") from error
    if len(head) < HEADER.size or head[:9] != MAGIC:
        raise DataError(
            f"{path} is not a Megatron index (it begins with {head[:9]!r})\n  fix: prepare the corpus again"
        )
    _, version, code, num_sequences, num_documents = HEADER.unpack(head)
    expected = HEADER.size + 12 * num_sequences + 8 * num_documents
    if version != 1 or code not in DTYPES:
        raise DataError(
            f"{path}: version {version}, dtype code {code} are not supported (need 1 and one of {list(DTYPES)})"
        )
    if num_sequences and size == expected + num_sequences:
        raise DataError(
            f"{path} is a multimodal Megatron index: {num_sequences} sequence modes of one byte each follow what its "
            "header describes\n  why: sequences that are not text are not supported\n"
            "  fix: build a pair of the text alone, without modes"
        )
    if size != expected:
        raise DataError(
            f"{path} is {'truncated' if size < expected else 'damaged'}: {size} bytes, {expected} by its header\n"
            "  fix: copy the store again, or prepare the corpus again"
        )
    raw = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))
    sizes = raw[HEADER.size : HEADER.size + 4 * num_sequences].view(np.int32)
    pointers = raw[HEADER.size + 4 * num_sequences : HEADER.size + 12 * num_sequences].view(np.int64)
    documents = raw[HEADER.size + 12 * num_sequences :].view(np.int64)
    return MegatronIndex(np.dtype(DTYPES[code]), sizes, pointers, documents)


def index_bytes(sizes: np.ndarray, dtype: np.dtype[Any]) -> bytes:
    """The .idx file of sequences with these sizes (tokens), one document each, one after the other."""
    sizes32 = np.asarray(sizes, dtype=np.int32)
    pointers = np.zeros(len(sizes32), dtype=np.int64)
    np.cumsum(sizes32[:-1].astype(np.int64) * dtype.itemsize, out=pointers[1:])
    documents = np.arange(len(sizes32) + 1, dtype=np.int64)
    head = HEADER.pack(MAGIC, 1, CODES[dtype], len(sizes32), len(documents))
    return head + sizes32.tobytes() + pointers.tobytes() + documents.tobytes()
