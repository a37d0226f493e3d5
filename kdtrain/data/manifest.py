"""manifest.json of a token store: its fields, the store's fingerprint, and the checks of both."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from kdtrain.errors import DataError
from kdtrain.stores.files import StoredFile

FORMAT, VERSION = "kdtrain-token-store", 1
DTYPES = ("uint16", "int32")
"""Of tokens, see `token_dtype`."""
DAMAGED_FIX = "  fix: copy the store again, or prepare the corpus again"

_SHA256 = re.compile("[0-9a-f]{64}")


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

    def files(self) -> tuple[StoredFile, StoredFile]:
        """Its two files, tokens and index."""
        tokens = StoredFile(f"{self.name}.bin", self.bin_bytes, self.bin_sha256)
        return tokens, StoredFile(f"{self.name}.idx", self.idx_bytes, self.idx_sha256)


@dataclass(frozen=True, slots=True)
class Linked:
    """A shard whose .bin is a link to `path`, a file that is used in place and was last changed at `mtime_ns`."""

    shard: str
    path: str
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Content of manifest.json. text_bytes: UTF-8 bytes of the text, prefixes and separators not counted.

    document_prefix: tokens every document begins with, () in older manifests, without the field. added_ids: ids that
    occur and are not of the vocabulary the tokenizer was trained with, ascending; None where that was not recorded.
    linked: shards whose tokens are used in place. left_out: number of texts left out, by reason. The last two are
    written if not empty.
    """

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
    document_prefix: tuple[int, ...] = ()
    added_ids: tuple[int, ...] | None = None
    linked: tuple[Linked, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)


def manifest_bytes(manifest: Manifest) -> bytes:
    """The file manifest.json."""
    content = {name: value for name, value in asdict(manifest).items() if value or name not in ("linked", "left_out")}
    return (json.dumps(content, indent=2) + "\n").encode()


def token_dtype(vocab_size: int) -> str:
    """Type of the tokens on disk: uint16 for vocabularies of at most 65535, else int32."""
    return DTYPES[0] if vocab_size <= 65535 else DTYPES[1]


def shard_name(number: int) -> str:
    """Name, without suffix, of the number-th shard's files."""
    return f"shard_{number:05d}"


def shards_fingerprint(shards: Sequence[Shard]) -> str:
    """sha256 over the shards' checksums in their order: the identity of a store's token stream."""
    return hashlib.sha256("".join(s.bin_sha256 + s.idx_sha256 for s in shards).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store in folder `path`, every field checked for type and range.

    The fingerprint is checked against the shards' entries and their order.
    Raises DataError naming the file and the field.
    """
    file = path / "manifest.json"
    if not file.is_file():
        inside = [name for name in ("train", "validation") if (path / name / "manifest.json").is_file()]
        fix = f"name {path / inside[0]}" if inside else "make one with launch/prepare_corpus.py"
        raise DataError(f"{path} is not a token store: it has no manifest.json\n  fix: {fix}")
    manifest = _parse(file)
    if not manifest.shards:
        raise DataError(f"{path} is empty: its manifest lists no shards\n  fix: prepare the corpus again")
    for problem in _problems(manifest):
        raise DataError(f"{file} is damaged: {problem}\n{DAMAGED_FIX}")
    return manifest


def _parse(file: Path) -> Manifest:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("format") != FORMAT or found.get("version") != VERSION:
            raise DataError(
                f"{file}: format {found.get('format')!r} version {found.get('version')!r}; this kdtrain reads "
                f"{FORMAT!r} version {VERSION}\n  fix: prepare the corpus again, or use the kdtrain that wrote it"
            )
        shards = tuple(Shard(**shard) for shard in found.pop("shards"))
        prefix, added = tuple(found.pop("document_prefix", ())), found.pop("added_ids", None)
        added = None if added is None else tuple(added)
        linked = tuple(Linked(**entry) for entry in found.pop("linked", ()))
        return Manifest(**found, shards=shards, document_prefix=prefix, added_ids=added, linked=linked)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is damaged: {error}\n{DAMAGED_FIX}") from error


def _problems(m: Manifest) -> Iterator[str]:
    """Descriptions of wrong fields, most basic first: later checks rely on the types that earlier ones checked."""
    if m.dtype not in DTYPES:
        yield f"dtype is {m.dtype!r}, must be one of {DTYPES}"
    for name, low, high in (
        ("num_documents", 1, None),
        ("num_tokens", 1, None),
        ("text_bytes", 0, None),
        ("vocab_size", 1, 1 << 31),
    ):
        yield from _count(name, getattr(m, name), low, high)
    yield from _count("separator_id", m.separator_id, 0, m.vocab_size)
    for place, token in enumerate(m.document_prefix):
        yield from _count(f"document_prefix[{place}]", token, 0, m.vocab_size)
    for entry in m.linked:
        if not any(shard.name == entry.shard for shard in m.shards):
            yield f"linked names the shard {entry.shard!r}, which does not exist"
        yield from _count(f"mtime_ns of {entry.shard!r}", entry.mtime_ns, 0, None)
    if not isinstance(m.left_out, dict):
        yield f"left_out is {m.left_out!r}, must be counts by reason"
    else:
        for reason, count in m.left_out.items():
            yield from _count(f"left_out[{reason!r}]", count, 0, None)
    for place, token in enumerate(m.added_ids or ()):
        yield from _count(f"added_ids[{place}]", token, 0, m.vocab_size)
    if not isinstance(m.source, str):
        yield f"source is {m.source!r}, must be a text"
    yield from _checksum("tokenizer_fingerprint", m.tokenizer_fingerprint)
    yield from _checksum("fingerprint", m.fingerprint)
    if m.dtype != token_dtype(m.vocab_size):
        yield f"vocab_size is {m.vocab_size}, which does not fit dtype {m.dtype!r}"
    for number, shard in enumerate(m.shards):
        yield from (f"shards[{number}]: {problem}" for problem in _shard_problems(shard, number, m.dtype))
    tokens, documents = sum(s.num_tokens for s in m.shards), sum(s.num_documents for s in m.shards)
    if (m.num_documents, m.num_tokens) != (documents, tokens):
        yield f"{m.num_documents} documents, {m.num_tokens} tokens, but its shards hold {documents} and {tokens}"
    expected = shards_fingerprint(m.shards)
    if m.fingerprint != expected:
        yield f"fingerprint is {m.fingerprint}, that of its shards in their order is {expected}"


def _shard_problems(shard: Shard, number: int, dtype: str) -> Iterator[str]:
    if shard.name != shard_name(number):
        yield f"name is {shard.name!r}, must be {shard_name(number)!r}"
    for name in ("num_documents", "num_tokens", "bin_bytes", "idx_bytes"):
        yield from _count(name, getattr(shard, name), 1, None)
    yield from _checksum("bin_sha256", shard.bin_sha256)
    yield from _checksum("idx_sha256", shard.idx_sha256)
    expected = shard.num_tokens * np.dtype(dtype).itemsize
    if shard.bin_bytes != expected:
        yield f"bin_bytes is {shard.bin_bytes}, must be {expected} for {shard.num_tokens} tokens of {dtype!r}"


def _count(name: str, value: object, low: int, high: int | None) -> Iterator[str]:
    if type(value) is not int or value < low or (high is not None and value >= high):  # a bool is an int in Python
        bounds = f"of at least {low}" if high is None else f"in [{low}, {high})"
        yield f"{name} is {value!r}, must be a whole number {bounds}"


def _checksum(name: str, value: object) -> Iterator[str]:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        yield f"{name} is {value!r}, must be a sha256 in hexadecimal"
