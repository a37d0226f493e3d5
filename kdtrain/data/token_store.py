"""Tokens on disk: Megatron .bin/.idx shards with a manifest that describes and checks them.

A store is a folder: manifest.json, shard_00000.bin, shard_00000.idx, ..., and tokenizer/ with the tokenizer that made
it. It is written under a temporary name and renamed when complete (`kdtrain.stores`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType

import numpy as np

from kdtrain.data.manifest import (
    DAMAGED_FIX,
    Linked,
    Manifest,
    Shard,
    manifest_bytes,
    read_manifest,
    shard_name,
    shards_fingerprint,
    token_dtype,
)
from kdtrain.data.megatron_index import index_bytes
from kdtrain.data.shards import check_borders, map_shard, shown_and_fix
from kdtrain.data.tokenizer import fingerprint, first_fingerprint, trained_ids, vocab_size
from kdtrain.data.used_ids import scan_ids
from kdtrain.errors import ConfigError, DataError
from kdtrain.files import TOKENIZER_FILES, sync, write_synced
from kdtrain.stores.checksums import ChecksummedFile
from kdtrain.stores.folders import write_manifest
from kdtrain.stores.unfinished import UnfinishedFolder, remove_abandoned

TOKENIZER = "tokenizer"
SHARD_TOKENS = 1 << 30
"""Number of tokens after which a new shard begins."""
MAPPED_SHARDS = 128
"""Shards that are mapped at a time, two files each."""


class TokenStore:
    """Random access to documents and to the stream of all tokens, memory-mapped. Thread-safe.

    A mapped file takes a file descriptor, and the usual limit is 1024 per process: at most MAPPED_SHARDS are mapped at
    a time, so that a store may have any number of shards. Use `open` to make one. path: the folder; manifest: the
    content of its manifest.json. Does not communicate. Reading raises DataError for a damaged or missing file.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._shard = lru_cache(maxsize=MAPPED_SHARDS)(partial(map_shard, path, manifest))
        self._token_edges = np.cumsum([0, *(s.num_tokens for s in manifest.shards)])
        self._document_edges = np.cumsum([0, *(s.num_documents for s in manifest.shards)])

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """Open a store. Checks sizes and the consistency of the indices, not every byte (see `verify`).

        Raises DataError naming the file, what was expected and found, and a fix.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        for number in range(len(manifest.shards)):
            map_shard(path, manifest, number)
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
        """A writer for a new store: a context manager, with `commit` as its last call; see `TokenStoreWriter`."""
        return TokenStoreWriter(folder, tokenizer_dir, separator_id, source=source, document_prefix=document_prefix)

    def __len__(self) -> int:
        """Number of documents."""
        return self.manifest.num_documents

    @property
    def num_tokens(self) -> int:
        """Number of tokens, separators included."""
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
        out = np.empty(stop - start, dtype=np.int64)  # filled shard by shard, so that the result keeps no shard mapped
        for shard in self._shards_of(start, stop):
            first, last = int(self._token_edges[shard]), int(self._token_edges[shard + 1])
            low, high = max(start, first), min(stop, last)
            out[low - start : high - start] = self._shard(shard)[0][low - first : high - first]
        return out

    def occurring_ids(self, wanted: Collection[int]) -> list[int]:
        """The ids of `wanted` that occur in the store, ascending.

        Read from the manifest if `added_ids` is recorded and `wanted` holds no id of the trained vocabulary; else every
        token is read once.
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
            for file in shard.files():
                if (found := file.other_sha256(self.path)) is not None:
                    shown, fix = shown_and_fix(self.path / file.name, self.manifest)
                    raise DataError(f"{shown} is damaged: sha256 {found}, {file.sha256} in the manifest\n{fix}")
        for number, shard in enumerate(self.manifest.shards):
            tokens, index = self._shard(number)
            index.check(self.path / f"{shard.name}.idx")
            check_borders(self.path, self.manifest, shard.name, tokens, index, np.arange(shard.num_documents))
        self._verify_tokenizer()

    def _verify_tokenizer(self) -> None:
        found, recorded = fingerprint(self.path / TOKENIZER), self.manifest.tokenizer_fingerprint
        if recorded not in (found, first_fingerprint(self.path / TOKENIZER)):
            raise DataError(
                f"{self.path / TOKENIZER} is not the tokenizer that made the tokens: fingerprint {found}, "
                f"{recorded} in the manifest\n{DAMAGED_FIX}"
            )
        size = vocab_size(self.path / TOKENIZER)
        if size != self.manifest.vocab_size:
            raise DataError(
                f"{self.path}/manifest.json is damaged: vocab_size is {self.manifest.vocab_size}, that of "
                f"{self.path / TOKENIZER} is {size}\n{DAMAGED_FIX}"
            )
        if self.manifest.added_ids is None:
            return
        occurring = scan_ids(self, set(range(size)) - trained_ids(self.path / TOKENIZER))
        if list(self.manifest.added_ids) != occurring:
            raise DataError(
                f"{self.path}/manifest.json is damaged: added_ids is {list(self.manifest.added_ids)}, of the ids "
                f"outside the trained vocabulary {occurring} occur\n{DAMAGED_FIX}"
            )


class TokenStoreWriter:
    """Writes a store document by document; `commit` renames it to `folder`, without `commit` nothing is kept.

    Folders that killed processes of this machine left beside `folder` are removed first (`kdtrain.stores.unfinished`).
    document_prefix: ids before every document; separator_id: the id after it. Use as a context manager. Not
    thread-safe. Raises ConfigError if `folder` exists or cannot be written, or if the
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
        remove_abandoned(self.folder.parent, "prepare")
        try:
            self._unfinished = UnfinishedFolder(self.folder)
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot be written: {error.strerror}\n  fix: choose another folder"
            ) from error
        self._shards: list[Shard] = []
        self._linked: list[Linked] = []
        self._sizes: list[int] = []
        self._file: ChecksummedFile | None = None
        self._text_bytes = 0
        self._manifest: Manifest | None = None
        self._seen = np.zeros(self._vocab_size, dtype=bool)
        self._num_seen = 0

    def add(self, ids: np.ndarray | list[int], text_bytes: int) -> None:
        """One document: its ids, without prefix and separator, and the size of its text in UTF-8 bytes."""
        tokens = np.concatenate(
            [np.asarray(part, dtype=np.int64) for part in (self._prefix, ids, [self._separator_id])]
        )
        self.add_block(tokens, np.array([len(tokens)]), text_bytes)

    def add_block(self, tokens: np.ndarray, sizes: np.ndarray, text_bytes: int) -> None:
        """Documents one after the other, each with its prefix and separator; sizes [documents]: tokens of each.

        text_bytes: of all of them, in UTF-8. Raises DataError for ids outside the vocabulary, before it writes any.
        """
        self._check_ids(tokens, sizes)
        self._seen[tokens] = True
        self._num_seen += len(tokens)
        stops = np.cumsum(sizes)
        document = start = 0
        with _disk_errors(self.folder):
            while document < len(sizes):
                if self._file is None:
                    self._file = ChecksummedFile(self._unfinished.path / f"{shard_name(len(self._shards))}.bin")
                room = self._shard_tokens - self._file.size // self._dtype.itemsize
                last = min(int(np.searchsorted(stops, start + room)), len(sizes) - 1)  # fills the shard
                self._file.write(np.ascontiguousarray(tokens[start : stops[last]], dtype=self._dtype).data)
                self._sizes += sizes[document : last + 1].tolist()
                document, start = last + 1, int(stops[last])
                if self._file.size >= self._shard_tokens * self._dtype.itemsize:
                    self._close_shard()
        self._text_bytes += text_bytes

    def _check_ids(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        if len(tokens) == 0 or (tokens.min() >= 0 and tokens.max() < self._vocab_size):
            return
        place = int(np.argmax((tokens < 0) | (tokens >= self._vocab_size)))
        before = sum(s.num_documents for s in self._shards) + len(self._sizes)
        raise DataError(
            f"document {before + int(np.searchsorted(np.cumsum(sizes), place, side='right'))}: token "
            f"{int(tokens[place])} is not in [0, {self._vocab_size}), the vocabulary of {self._tokenizer_dir}\n"
            "  fix: name the tokenizer that made the tokens"
        )

    def link_shard(
        self, data: Path, sizes: np.ndarray, sha256: str, mtime_ns: int, text_bytes: int, seen: np.ndarray
    ) -> None:
        """Add a shard that uses the tokens of another file in place; its index is written into the store.

        data: a file that the caller has read: documents of `sizes` tokens with prefix and separator and nothing else,
        of the store's dtype. sha256: its checksum. mtime_ns: its modification time before it was read. seen [V] bool:
        the ids that occur.
        """
        with _disk_errors(self.folder):
            self._close_shard()
            name, target = shard_name(len(self._shards)), data.resolve()
            (self._unfinished.path / f"{name}.bin").symlink_to(target)
            self._sizes = sizes.tolist()
            self._add_shard(name, sha256)
        self._seen |= seen
        self._num_seen += int(sizes.sum())
        self._linked.append(Linked(name, str(target), mtime_ns))
        self._text_bytes += text_bytes

    def _close_shard(self) -> None:
        if self._file is None:
            return
        name = shard_name(len(self._shards))
        sha256 = self._file.commit()
        self._file = None
        self._add_shard(name, sha256)

    def _add_shard(self, name: str, sha256: str) -> None:
        """Write the index of the documents in `_sizes`."""
        index = index_bytes(np.asarray(self._sizes), self._dtype)
        write_synced(self._unfinished.path / f"{name}.idx", index)
        tokens = int(np.sum(self._sizes, dtype=np.int64))
        self._shards.append(
            Shard(
                name,
                len(self._sizes),
                tokens,
                tokens * self._dtype.itemsize,
                len(index),
                sha256,
                hashlib.sha256(index).hexdigest(),
            )
        )
        self._sizes = []

    def write_all(self, left_out: Mapping[str, int] | None = None) -> Manifest:
        """Write everything to disk, still under the temporary name. left_out: documents that were not added, by reason.

        Raises DataError if no document was added.
        """
        if self._manifest is not None:
            return self._manifest
        with _disk_errors(self.folder):
            self._close_shard()
            if not self._shards:
                raise DataError(
                    f"{self.folder}: no documents\n  why: a store without tokens cannot be trained on\n"
                    "  fix: name files that hold text"
                )
            (self._unfinished.path / TOKENIZER).mkdir()
            for file in sorted(self._tokenizer_dir.iterdir()):
                if file.name in TOKENIZER_FILES:
                    write_synced(self._unfinished.path / TOKENIZER / file.name, file.read_bytes())
            manifest = Manifest(
                dtype=str(self._dtype),
                num_documents=sum(s.num_documents for s in self._shards),
                num_tokens=sum(s.num_tokens for s in self._shards),
                text_bytes=self._text_bytes,
                vocab_size=self._vocab_size,
                separator_id=self._separator_id,
                tokenizer_fingerprint=fingerprint(self._tokenizer_dir),
                source=self._source,
                fingerprint=shards_fingerprint(self._shards),
                shards=tuple(self._shards),
                document_prefix=self._prefix,
                added_ids=self._added_ids(),
                linked=tuple(self._linked),
                left_out={reason: count for reason, count in (left_out or {}).items() if count},
            )
            sync(self._unfinished.path / TOKENIZER)
            write_manifest(self._unfinished.path, "manifest.json", manifest_bytes(manifest))
        self._manifest = manifest
        return manifest

    def _added_ids(self) -> tuple[int, ...] | None:
        """Ids outside the trained vocabulary that were written; None unless every token was seen."""
        if self._num_seen != sum(s.num_tokens for s in self._shards):
            return None
        trained = trained_ids(self._tokenizer_dir)
        return tuple(int(i) for i in np.flatnonzero(self._seen) if i not in trained)

    def commit(self, left_out: Mapping[str, int] | None = None) -> Manifest:
        """`write_all`, then rename the store to `folder`. Raises as `write_all`."""
        manifest = self.write_all(left_out)
        with _disk_errors(self.folder):
            self._unfinished.publish()
        return manifest

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._unfinished.close()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: writing failed: {error.strerror}\n  why: nothing was kept\n"
            "  fix: free some space or choose another folder, then run again"
        ) from error
