"""Tokens on disk: Megatron .bin/.idx shards plus a manifest that says what they are and refuses misuse.

A store is a folder: manifest.json, shard_00000.bin, shard_00000.idx, ..., and tokenizer/ with the tokenizer that made
it. It is written under a temporary name and renamed at the end, so a half-written store is never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kdtrain.data.megatron_index import MegatronIndex, index_bytes, read_index
from kdtrain.data.tokenizer import fingerprint, load_tokenizer, vocab_size
from kdtrain.errors import ConfigError, DataError

FORMAT, VERSION = "kdtrain-token-store", 1
TOKENIZER = "tokenizer"
SHARD_TOKENS = 1 << 30
"""Tokens after which a new shard begins."""


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
    """Random access to documents and to the stream of all tokens, memory-mapped. Thread-safe; keeps no state."""

    def __init__(
        self, path: Path, manifest: Manifest, bins: Sequence[np.ndarray], indices: list[MegatronIndex]
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._bins = bins
        self._indices = indices
        self._token_edges = np.cumsum([0, *(s.num_tokens for s in manifest.shards)])
        self._document_edges = np.cumsum([0, *(s.num_documents for s in manifest.shards)])

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """Open a store. Checks sizes and index consistency, not every byte (see `verify`).

        Raises DataError naming the file, what was expected and found, and a fix.
        """
        path = Path(folder)
        manifest = _read_manifest(path)
        bins, indices = [], []
        for shard in manifest.shards:
            for suffix, expected in ((".bin", shard.bin_bytes), (".idx", shard.idx_bytes)):
                _check_size(path / (shard.name + suffix), expected)
            index = read_index(path / f"{shard.name}.idx")
            dtype = np.dtype(manifest.dtype)
            if index.dtype != dtype or len(index.sizes) != shard.num_documents or index.num_tokens != shard.num_tokens:
                raise DataError(
                    f"{path / shard.name}.idx does not describe what {path}/manifest.json says: {index.dtype}, "
                    f"{len(index.sizes)} documents, {index.num_tokens} tokens; the manifest says {dtype}, "
                    f"{shard.num_documents}, {shard.num_tokens}\n  fix: prepare the corpus again"
                )
            bins.append(np.memmap(path / f"{shard.name}.bin", mode="r", dtype=dtype))
            indices.append(index)
        return cls(path, manifest, bins, indices)

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
        index = self._indices[shard]
        local = document - int(self._document_edges[shard])
        start = int(index.pointers[local]) // index.dtype.itemsize
        return self._bins[shard][start : start + int(index.sizes[local])]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of all documents one after the other, as int64. IndexError outside the store."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) are not in [0, {self.num_tokens})")
        parts = []
        for shard in range(len(self._bins)):
            first, last = int(self._token_edges[shard]), int(self._token_edges[shard + 1])
            if first < stop and start < last:
                parts.append(self._bins[shard][max(start, first) - first : min(stop, last) - first])
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions p in [start, stop) of the token stream at which a document begins, ascending, int64."""
        parts = []
        for shard, index in enumerate(self._indices):
            first, last = int(self._token_edges[shard]), int(self._token_edges[shard + 1])
            if first >= stop or start >= last:
                continue
            size = index.dtype.itemsize
            low, high = np.searchsorted(index.pointers, [(start - first) * size, (stop - first) * size])
            parts.append(index.pointers[low:high] // size + first)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def verify(self) -> None:
        """Read every byte and compare checksums. Raises DataError naming the damaged file."""
        for shard in self.manifest.shards:
            for suffix, expected in ((".bin", shard.bin_sha256), (".idx", shard.idx_sha256)):
                path = self.path / (shard.name + suffix)
                found = _sha256(path)
                if found != expected:
                    raise DataError(
                        f"{path} is damaged: sha256 {found}, the manifest says {expected}\n"
                        "  fix: copy the store again, or prepare the corpus again"
                    )


class TokenStoreWriter:
    """Writes a store document by document; `commit` makes it appear, anything else leaves nothing behind.

    Use as a context manager. Raises ConfigError if `folder` exists or cannot be written.
    """

    def __init__(self, folder: str | Path, tokenizer_dir: str | Path, separator_id: int, *, source: str) -> None:
        self.folder = Path(folder)
        if self.folder.exists():
            raise ConfigError(f"{self.folder} exists already\n  fix: name a new folder, or remove this one")
        self._tokenizer_dir = Path(tokenizer_dir)
        self._vocab_size = vocab_size(load_tokenizer(tokenizer_dir))
        self._separator_id = separator_id
        self._source = source
        self._dtype = np.dtype(np.uint16 if self._vocab_size <= 65535 else np.int32)
        self._temporary = self.folder.with_name(f".{self.folder.name}.writing.{uuid.uuid4().hex[:8]}")
        try:
            self._temporary.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot be written: {error.strerror}\n  fix: choose another folder"
            ) from error
        self._shards: list[Shard] = []
        self._sizes: list[int] = []
        self._file: Any = None
        self._digest = hashlib.sha256()
        self._text_bytes = 0

    def add(self, ids: np.ndarray | list[int], text_bytes: int) -> None:
        """One document: its ids, without separator, and the size of its text in UTF-8 bytes."""
        tokens = np.append(np.asarray(ids, dtype=np.int64), self._separator_id)
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise DataError(f"token {int(tokens.max())} is not in [0, {self._vocab_size}), the tokenizer's vocabulary")
        if self._file is None:
            self._file = (self._temporary / f"shard_{len(self._shards):05d}.bin").open("wb")
            self._digest = hashlib.sha256()
        data = tokens.astype(self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._sizes.append(len(tokens))
        self._text_bytes += text_bytes
        if self._file.tell() >= SHARD_TOKENS * self._dtype.itemsize:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        name = f"shard_{len(self._shards):05d}"
        _flush_and_close(self._file)
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

    def commit(self) -> Manifest:
        """Finish: checksums, manifest, rename. Raises DataError if no document was added."""
        self._close_shard()
        if not self._shards:
            raise DataError(f"{self.folder}: no documents\n  why: a store without tokens cannot be trained on")
        shutil.copytree(self._tokenizer_dir, self._temporary / TOKENIZER, ignore=_only_tokenizer_files)
        together = hashlib.sha256("".join(s.bin_sha256 + s.idx_sha256 for s in self._shards).encode()).hexdigest()
        manifest = Manifest(
            dtype=str(self._dtype), num_documents=sum(s.num_documents for s in self._shards),
            num_tokens=sum(s.num_tokens for s in self._shards), text_bytes=self._text_bytes,
            vocab_size=self._vocab_size, separator_id=self._separator_id,
            tokenizer_fingerprint=fingerprint(self._tokenizer_dir), source=self._source, fingerprint=together,
            shards=tuple(self._shards),
        )  # fmt: skip
        _write(self._temporary / "manifest.json", (json.dumps(asdict(manifest), indent=2) + "\n").encode())
        os.rename(self._temporary, self.folder)
        _sync_folder(self.folder.parent)
        return manifest

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self._temporary, ignore_errors=True)


def _read_manifest(path: Path) -> Manifest:
    file = path / "manifest.json"
    if not file.is_file():
        raise DataError(
            f"{path} is no token store: it has no manifest.json\n  fix: make one with launch/prepare_corpus.py"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("format") != FORMAT or found.get("version") != VERSION:
            raise DataError(
                f"{file}: format {found.get('format')!r} version {found.get('version')!r}; this kdtrain reads {FORMAT!r} "
                f"version {VERSION}\n  fix: prepare the corpus again, or use the kdtrain that wrote it"
            )
        shards = tuple(Shard(**shard) for shard in found.pop("shards"))
        return Manifest(**found, shards=shards)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is damaged: {error}\n  fix: copy the store again, or prepare the corpus again"
        ) from error


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        raise DataError(f"{path} is missing\n  fix: copy the store again, or prepare the corpus again")
    if found != expected:
        raise DataError(
            f"{path} is {'truncated' if found < expected else 'damaged'}: {found} bytes, the manifest says {expected}\n"
            "  fix: copy the store again, or prepare the corpus again"
        )


def _only_tokenizer_files(folder: str, names: list[str]) -> list[str]:
    """What not to copy: everything but a tokenizer's small text files (a model folder may hold gigabytes)."""
    wanted = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
    return [n for n in names if not n.startswith(wanted) or (Path(folder) / n).is_dir()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_and_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
