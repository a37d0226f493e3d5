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
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from kdtrain.data.megatron_index import MegatronIndex, index_bytes, read_index
from kdtrain.data.tokenizer import fingerprint, vocab_size
from kdtrain.errors import ConfigError, DataError

FORMAT, VERSION = "kdtrain-token-store", 1
TOKENIZER = "tokenizer"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
"""What is copied of a tokenizer's folder, which may hold a model's gigabytes too."""
SHARD_TOKENS = 1 << 30
"""Tokens after which a new shard begins."""
DTYPES = ("uint16", "int32")
"""Of tokens: uint16 for vocabularies of at most 65535."""
MAPPED_SHARDS = 128
"""Shards mapped at a time, two files each."""
INDEX_PROBES = 4096
"""Places of all indices together that `open` looks at; `verify` looks at all."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One .bin/.idx pair: its name without suffix, contents, sizes in bytes and sha256 of both files."""

    name: str
    num_documents: int
    num_tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What manifest.json says. text_bytes: UTF-8 bytes of the text, separators not counted."""

    dtype: str
    num_documents: int
    num_tokens: int
    text_bytes: int
    vocab_size: int
    separator_id: int
    tokenizer_fingerprint: str
    source: str
    fingerprint: str
    shards: tuple[Shard, ...] = field(default=())
    format: str = FORMAT
    version: int = VERSION


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
        manifest = _read_manifest(path)
        for number in range(len(manifest.shards)):
            _map_shard(path, manifest, number)
        return cls(path, manifest)

    @staticmethod
    def create(folder: str | Path, tokenizer_dir: str | Path, separator_id: int, *, source: str) -> TokenStoreWriter:
        """A writer for a new store, to be used as a context manager and ended by its `commit`."""
        return TokenStoreWriter(folder, tokenizer_dir, separator_id, source=source)

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
        """Read every byte: checksums, whole indices, the tokenizer. Raises DataError naming the damaged file."""
        for shard in self.manifest.shards:
            for suffix, expected in ((".bin", shard.bin_sha256), (".idx", shard.idx_sha256)):
                path = self.path / (shard.name + suffix)
                found = _sha256(path)
                if found != expected:
                    raise DataError(
                        f"{path} is damaged: sha256 {found}, the manifest says {expected}\n"
                        "  fix: copy the store again, or prepare the corpus again"
                    )
        for number, shard in enumerate(self.manifest.shards):
            self._shard(number)[1].check(self.path / f"{shard.name}.idx")
        found = fingerprint(self.path / TOKENIZER)
        if found != self.manifest.tokenizer_fingerprint:
            raise DataError(
                f"{self.path / TOKENIZER} is not the tokenizer that made the tokens: fingerprint {found}, the manifest "
                f"says {self.manifest.tokenizer_fingerprint}\n  fix: copy the store again, or prepare the corpus again"
            )


class TokenStoreWriter:
    """Writes a store document by document; `commit` makes it appear, anything else leaves nothing behind.

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
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.folder = Path(folder)
        self._tokenizer_dir = Path(tokenizer_dir)
        self._vocab_size = vocab_size(tokenizer_dir)
        self._separator_id = separator_id
        self._source = source
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype(np.uint16 if self._vocab_size <= 65535 else np.int32)
        if self.folder.exists():
            raise ConfigError(f"{self.folder} exists already\n  fix: name a new folder, or remove this one")
        self._temporary = self.folder.with_name(f".{self.folder.name}.writing.{uuid.uuid4().hex[:8]}")
        try:
            self._temporary.mkdir(parents=True)
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

    def add(self, ids: np.ndarray | list[int], text_bytes: int) -> None:
        """One document: its ids, without separator, and the size of its text in UTF-8 bytes."""
        tokens = np.append(np.asarray(ids, dtype=np.int64), self._separator_id)
        outside = tokens[(tokens < 0) | (tokens >= self._vocab_size)]
        if len(outside):
            raise DataError(
                f"document {sum(s.num_documents for s in self._shards) + len(self._sizes)}: token {int(outside[0])} is "
                f"not in [0, {self._vocab_size}), the vocabulary of {self._tokenizer_dir}\n"
                "  fix: name the tokenizer that made the tokens"
            )
        with _disk_errors(self.folder):
            if self._file is None:
                self._file = (self._temporary / f"shard_{len(self._shards):05d}.bin").open("wb")
                self._digest = hashlib.sha256()
            data = tokens.astype(self._dtype).tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._sizes.append(len(tokens))
            self._text_bytes += text_bytes
            if self._file.tell() >= self._shard_tokens * self._dtype.itemsize:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        name = f"shard_{len(self._shards):05d}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        index = index_bytes(np.asarray(self._sizes), self._dtype)
        _write(self._temporary / f"{name}.idx", index)
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
                    _write(self._temporary / TOKENIZER / file.name, file.read_bytes())
            together = hashlib.sha256("".join(s.bin_sha256 + s.idx_sha256 for s in self._shards).encode()).hexdigest()
            manifest = Manifest(
                dtype=str(self._dtype), num_documents=sum(s.num_documents for s in self._shards),
                num_tokens=sum(s.num_tokens for s in self._shards), text_bytes=self._text_bytes,
                vocab_size=self._vocab_size, separator_id=self._separator_id,
                tokenizer_fingerprint=fingerprint(self._tokenizer_dir), source=self._source, fingerprint=together,
                shards=tuple(self._shards),
            )  # fmt: skip
            _write(self._temporary / "manifest.json", (json.dumps(asdict(manifest), indent=2) + "\n").encode())
            _sync_folder(self._temporary / TOKENIZER)
            _sync_folder(self._temporary)
        self._manifest = manifest
        return manifest

    def commit(self) -> Manifest:
        """`finish`, then give the store its name: it is either there and whole, or not there."""
        manifest = self.finish()
        with _disk_errors(self.folder):
            os.rename(self._temporary, self.folder)
            _sync_folder(self.folder.parent)
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


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: writing failed: {error.strerror}\n  why: nothing was kept\n"
            "  fix: free some space or choose another folder, then run again"
        ) from error


def _read_manifest(path: Path) -> Manifest:
    file = path / "manifest.json"
    if not file.is_file():
        inside = [name for name in ("train", "validation") if (path / name / "manifest.json").is_file()]
        fix = f"name {path / inside[0]}" if inside else "make one with launch/prepare_corpus.py"
        raise DataError(f"{path} is not a token store: it has no manifest.json\n  fix: {fix}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("format") != FORMAT or found.get("version") != VERSION:
            raise DataError(
                f"{file}: format {found.get('format')!r} version {found.get('version')!r}; this kdtrain reads "
                f"{FORMAT!r} version {VERSION}\n  fix: prepare the corpus again, or use the kdtrain that wrote it"
            )
        shards = tuple(Shard(**shard) for shard in found.pop("shards"))
        manifest = Manifest(**found, shards=shards)
        tokens, documents = sum(s.num_tokens for s in shards), sum(s.num_documents for s in shards)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is damaged: {error}\n  fix: copy the store again, or prepare the corpus again"
        ) from error
    wrong = (manifest.num_tokens, manifest.num_documents) != (tokens, documents)
    if wrong or manifest.dtype not in DTYPES or not all(s.num_tokens > 0 and s.num_documents > 0 for s in shards):
        raise DataError(
            f"{file} is damaged: {manifest.num_documents} documents, {manifest.num_tokens} tokens of "
            f"{manifest.dtype!r}, but its shards hold {documents} and {tokens}, and the dtype must be "
            f"one of {DTYPES} and no shard empty\n"
            "  fix: copy the store again, or prepare the corpus again"
        )
    if not shards:
        raise DataError(f"{path} is empty: its manifest lists no shards\n  fix: prepare the corpus again")
    return manifest


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
    return tokens, index


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        raise DataError(f"{path} is missing\n  fix: copy the store again, or prepare the corpus again")
    if found != expected:
        raise DataError(
            f"{path} is {'truncated' if found < expected else 'damaged'}: {found} bytes, the manifest says {expected}\n"
            "  fix: copy the store again, or prepare the corpus again"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
