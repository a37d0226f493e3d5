"""Tokens on disk: Megatron .bin/.idx shards plus a manifest that says what they are and refuses misuse.

A store is a folder: manifest.json, shard_00000.bin, shard_00000.idx, ..., and tokenizer/ with the tokenizer that made
it. It is written under a temporary name and renamed at the end, so a half-written store is never opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from kdtrain.data.manifest import (
    DAMAGED_FIX,
    Manifest,
    Shard,
    read_manifest,
    shard_name,
    shards_fingerprint,
    token_dtype,
)
from kdtrain.data.megatron_index import MegatronIndex, index_bytes, read_index
from kdtrain.data.tokenizer import TOKENIZER_FILES, fingerprint, trained_ids, vocab_size
from kdtrain.data.unfinished import make_unfinished, remove_abandoned
from kdtrain.data.used_ids import scan_ids
from kdtrain.errors import ConfigError, DataError
from kdtrain.files import sync, write_synced

TOKENIZER = "tokenizer"
SHARD_TOKENS = 1 << 30
"""Tokens after which a new shard begins."""
MAPPED_SHARDS = 128
"""Shards mapped at a time, two files each."""
INDEX_PROBES = 4096
"""Places of all indices together that `open` looks at; `verify` looks at all."""


class TokenStore:
    """Random access to documents and to the stream of all tokens, memory-mapped. Thread-safe.

    A mapped file costs a file descriptor, of which a process often has 1024; so at most MAPPED_SHARDS are mapped at a
    time, and a store may have any number. `open` makes one.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._shard = lru_cache(maxsize=MAPPED_SHARDS)(partial(_map_shard, path, manifest))
        self._token_edges = np.cumsum([0, *(s.num_tokens for s in manifest.shards)])
        self._document_edges = np.cumsum([0, *(s.num_documents for s in manifest.shards)])

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """Open a store. Checks sizes and index consistency, not every byte (see `verify`).

        Raises DataError naming the file, what was expected and found, and a fix.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        for number in range(len(manifest.shards)):
            _map_shard(path, manifest, number)
        return cls(path, manifest)

    @staticmethod
    def create(
        folder: str | Path,
        tokenizer_dir: str | Path,
        separator_id: int,
        *,
        source: str,
        document_prefix: Sequence[int] = (),
    ) -> TokenStoreWriter:
        """A writer for a new store, to be used as a context manager and ended by its `commit`."""
        return TokenStoreWriter(folder, tokenizer_dir, separator_id, source=source, document_prefix=document_prefix)

    def __len__(self) -> int:
        """Documents."""
        return self.manifest.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens, separators included."""
        return self.manifest.num_tokens

    def __getitem__(self, document: int) -> np.ndarray:
        """Tokens of a document, its separator included. IndexError outside [0, len)."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} is not in [0, {len(self)})")
        shard = int(np.searchsorted(self._document_edges, document, side="right")) - 1
        tokens, index = self._shard(shard)
        local = document - int(self._document_edges[shard])
        start = int(index.pointers[local]) // index.dtype.itemsize
        return tokens[start : start + int(index.sizes[local])]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of all documents one after the other, as int64. IndexError outside the store."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) are not in [0, {self.num_tokens})")
        out = np.empty(stop - start, dtype=np.int64)  # filled shard by shard, so that no shard stays mapped for it
        for shard in self._shards_of(start, stop):
            first, last = int(self._token_edges[shard]), int(self._token_edges[shard + 1])
            low, high = max(start, first), min(stop, last)
            out[low - start : high - start] = self._shard(shard)[0][low - first : high - first]
        return out

    def occurring_ids(self, wanted: Collection[int]) -> list[int]:
        """Those of the ids `wanted` that occur, ascending.

        By the manifest if it says so and `wanted` holds none of the trained vocabulary, else every token is read once.
        """
        recorded, wanted = self.manifest.added_ids, {i for i in wanted if 0 <= i < self.manifest.vocab_size}
        if not wanted or (recorded is not None and wanted.isdisjoint(trained_ids(self.path / TOKENIZER))):
            return sorted(wanted.intersection(recorded or ()))
        return scan_ids(self, wanted)

    def _shards_of(self, start: int, stop: int) -> range:
        """Numbers of the shards that hold tokens of [start, stop); no shard is empty."""
        if start >= stop:
            return range(0)
        first, last = np.searchsorted(self._token_edges, [start, stop - 1], side="right") - 1
        return range(max(int(first), 0), min(int(last), len(self.manifest.shards) - 1) + 1)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions p in [start, stop) of the token stream at which a document begins, ascending, int64."""
        parts = []
        for shard in self._shards_of(start, stop):
            first, index = int(self._token_edges[shard]), self._shard(shard)[1]
            size = index.dtype.itemsize
            low, high = (index.sequence_at((edge - first) * size) for edge in (start, stop))
            parts.append(index.pointers[low:high] // size + first)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def verify(self) -> None:
        """Read every byte: checksums, whole indices, separators, the tokenizer. DataError names the damaged file."""
        for shard in self.manifest.shards:
            for suffix, expected in ((".bin", shard.bin_sha256), (".idx", shard.idx_sha256)):
                path = self.path / (shard.name + suffix)
                found = _sha256(path)
                if found != expected:
                    raise DataError(f"{path} is damaged: sha256 {found}, the manifest says {expected}\n{DAMAGED_FIX}")
        for number, shard in enumerate(self.manifest.shards):
            tokens, index = self._shard(number)
            index.check(self.path / f"{shard.name}.idx")
            _check_borders(self.path, self.manifest, shard.name, tokens, index, np.arange(shard.num_documents))
        self._verify_tokenizer()

    def _verify_tokenizer(self) -> None:
        found = fingerprint(self.path / TOKENIZER)
        if found != self.manifest.tokenizer_fingerprint:
            raise DataError(
                f"{self.path / TOKENIZER} is not the tokenizer that made the tokens: fingerprint {found}, the manifest "
                f"says {self.manifest.tokenizer_fingerprint}\n{DAMAGED_FIX}"
            )
        tokens_of_it = vocab_size(self.path / TOKENIZER)
        if tokens_of_it != self.manifest.vocab_size:
            raise DataError(
                f"{self.path}/manifest.json is damaged: vocab_size is {self.manifest.vocab_size}, that of "
                f"{self.path / TOKENIZER} is {tokens_of_it}\n{DAMAGED_FIX}"
            )
        if self.manifest.added_ids is None:
            return
        occur = scan_ids(self, set(range(tokens_of_it)) - trained_ids(self.path / TOKENIZER))
        if list(self.manifest.added_ids) != occur:
            raise DataError(
                f"{self.path}/manifest.json is damaged: added_ids is {list(self.manifest.added_ids)}, of the ids "
                f"outside the trained vocabulary {occur} occur\n{DAMAGED_FIX}"
            )


class TokenStoreWriter:
    """Writes a store document by document; `commit` makes it appear, anything else leaves nothing behind.

    What a killed process of this machine left beside `folder` is removed first (`kdtrain.data.unfinished`).

    document_prefix: ids before every document, as separator_id is the one after it.

    Use as a context manager. Not thread-safe. Raises ConfigError if `folder` exists or cannot be written, or if the
    tokenizer is missing; DataError when the disk is full.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer_dir: str | Path,
        separator_id: int,
        *,
        source: str,
        document_prefix: Sequence[int] = (),
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.folder = Path(folder)
        self._tokenizer_dir = Path(tokenizer_dir)
        self._vocab_size = vocab_size(tokenizer_dir)
        self._prefix, self._separator_id = tuple(document_prefix), separator_id
        self._source = source
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype(token_dtype(self._vocab_size))
        if self.folder.exists():
            raise ConfigError(f"{self.folder} exists already\n  fix: name a new folder, or remove this one")
        remove_abandoned(self.folder.parent)
        try:
            self._temporary, self._lock = make_unfinished(self.folder)
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot be written: {error.strerror}\n  fix: choose another folder"
            ) from error
        self._shards: list[Shard] = []
        self._sizes: list[int] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._text_bytes = 0
        self._manifest: Manifest | None = None
        self._seen = np.zeros(self._vocab_size, dtype=bool)
        self._num_seen = 0

    def add(self, ids: np.ndarray | list[int], text_bytes: int) -> None:
        """One document: its ids, without prefix and separator, and the size of its text in UTF-8 bytes."""
        tokens = np.concatenate(
            [np.asarray(part, dtype=np.int64) for part in (self._prefix, ids, [self._separator_id])]
        )
        outside = tokens[(tokens < 0) | (tokens >= self._vocab_size)]
        if len(outside):
            raise DataError(
                f"document {sum(s.num_documents for s in self._shards) + len(self._sizes)}: token {int(outside[0])} is "
                f"not in [0, {self._vocab_size}), the vocabulary of {self._tokenizer_dir}\n"
                "  fix: name the tokenizer that made the tokens"
            )
        with _disk_errors(self.folder):
            if self._file is None:
                self._file = (self._temporary / f"{shard_name(len(self._shards))}.bin").open("wb")
                self._digest = hashlib.sha256()
            data = tokens.astype(self._dtype).tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._sizes.append(len(tokens))
            self._text_bytes += text_bytes
            self._seen[tokens] = True
            self._num_seen += len(tokens)
            if self._file.tell() >= self._shard_tokens * self._dtype.itemsize:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        name = shard_name(len(self._shards))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        index = index_bytes(np.asarray(self._sizes), self._dtype)
        write_synced(self._temporary / f"{name}.idx", index)
        tokens = int(np.sum(self._sizes, dtype=np.int64))
        self._shards.append(
            Shard(
                name, len(self._sizes), tokens, tokens * self._dtype.itemsize, len(index), self._digest.hexdigest(),
                hashlib.sha256(index).hexdigest(),
            )
        )  # fmt: skip
        self._sizes = []

    def finish(self) -> Manifest:
        """Write everything to disk, still under the temporary name. Raises DataError if no document was added."""
        if self._manifest is not None:
            return self._manifest
        with _disk_errors(self.folder):
            self._close_shard()
            if not self._shards:
                raise DataError(
                    f"{self.folder}: no documents\n  why: a store without tokens cannot be trained on\n"
                    "  fix: name files that hold text"
                )
            (self._temporary / TOKENIZER).mkdir()
            for file in sorted(self._tokenizer_dir.iterdir()):
                if file.name in TOKENIZER_FILES:
                    write_synced(self._temporary / TOKENIZER / file.name, file.read_bytes())
            manifest = Manifest(
                dtype=str(self._dtype), num_documents=sum(s.num_documents for s in self._shards),
                num_tokens=sum(s.num_tokens for s in self._shards), text_bytes=self._text_bytes,
                vocab_size=self._vocab_size, separator_id=self._separator_id,
                tokenizer_fingerprint=fingerprint(self._tokenizer_dir), source=self._source,
                fingerprint=shards_fingerprint(self._shards), shards=tuple(self._shards),
                document_prefix=self._prefix, added_ids=self._added_ids(),
            )  # fmt: skip
            write_synced(self._temporary / "manifest.json", (json.dumps(asdict(manifest), indent=2) + "\n").encode())
            sync(self._temporary / TOKENIZER)
            sync(self._temporary)
        self._manifest = manifest
        return manifest

    def _added_ids(self) -> tuple[int, ...] | None:
        """Ids outside the trained vocabulary that were written; None unless every token was looked at."""
        if self._num_seen != sum(s.num_tokens for s in self._shards):
            return None
        trained = trained_ids(self._tokenizer_dir)
        return tuple(int(i) for i in np.flatnonzero(self._seen) if i not in trained)

    def commit(self) -> Manifest:
        """`finish`, then give the store its name: it is either there and whole, or not there."""
        manifest = self.finish()
        with _disk_errors(self.folder):
            os.rename(self._temporary, self.folder)
            sync(self.folder.parent)
        return manifest

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk fails again at the flush; the file goes either way
                self._file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)
        os.close(self._lock)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: writing failed: {error.strerror}\n  why: nothing was kept\n"
            "  fix: free some space or choose another folder, then run again"
        ) from error


def _map_shard(path: Path, manifest: Manifest, number: int) -> tuple[np.ndarray, MegatronIndex]:
    """Tokens and index of a shard, mapped, sizes and a sample of the index checked. Raises DataError."""
    shard, dtype = manifest.shards[number], np.dtype(manifest.dtype)
    for suffix, expected in ((".bin", shard.bin_bytes), (".idx", shard.idx_bytes)):
        _check_size(path / (shard.name + suffix), expected)
    index = read_index(path / f"{shard.name}.idx")
    tokens = np.asarray(np.memmap(path / f"{shard.name}.bin", mode="r", dtype=dtype))
    found = (str(index.dtype), len(index.sizes), index.num_tokens, len(tokens))
    if found != (manifest.dtype, shard.num_documents, shard.num_tokens, shard.num_tokens):
        raise DataError(
            f"{path / shard.name}.idx does not describe what {path}/manifest.json says: {index.dtype}, "
            f"{len(index.sizes)} documents, {index.num_tokens} tokens; the manifest says {dtype}, "
            f"{shard.num_documents}, {shard.num_tokens}, in {shard.bin_bytes} bytes\n  fix: prepare the corpus again"
        )
    index.check(path / f"{shard.name}.idx", probes=max(1, INDEX_PROBES // len(manifest.shards)))
    _check_borders(path, manifest, shard.name, tokens, index, np.array([0, shard.num_documents - 1]))
    return tokens, index


def _check_borders(
    path: Path, manifest: Manifest, name: str, tokens: np.ndarray, index: MegatronIndex, documents: np.ndarray
) -> None:
    """These documents of a shard must begin and end with what the manifest says."""
    sizes, starts = index.sizes[documents], index.pointers[documents] // index.dtype.itemsize
    unbegun = sizes <= len(manifest.document_prefix)
    for place, token in enumerate(manifest.document_prefix):
        unbegun |= tokens[np.minimum(starts + place, len(tokens) - 1)] != token
    unended = tokens[starts + sizes - 1] != manifest.separator_id
    for wrong, what in (
        (unended, f"end with separator_id {manifest.separator_id}"),
        (unbegun, f"begin with document_prefix {list(manifest.document_prefix)}"),
    ):
        if wrong.any():
            raise DataError(
                f"{path}/manifest.json does not describe {name}.bin: its document {int(documents[np.argmax(wrong)])} "
                f"does not {what}\n{DAMAGED_FIX}"
            )


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        raise DataError(f"{path} is missing\n{DAMAGED_FIX}")
    if found != expected:
        raise DataError(
            f"{path} is {'truncated' if found < expected else 'damaged'}: {found} bytes, the manifest says {expected}\n"
            f"{DAMAGED_FIX}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
