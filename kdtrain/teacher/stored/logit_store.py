"""A folder of teachers' records by key of the sequence, made once and read by many runs.

It is a folder of records (`kdtrain.stores.record_folder`) whose identity says what the records were made from; nothing
is unpickled. `kdtrain.stores.record_writer.commit` finishes it when all shards are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kdtrain.errors import DataError
from kdtrain.stores.journal import Block
from kdtrain.stores.record_folder import RecordFolder, check_identity
from kdtrain.stores.record_writer import ShardWriter
from kdtrain.teacher.stored.codec import CODEC, decode, encode
from kdtrain.teacher.stored.records import RecordFields, SequenceRecords

KIND = "teacher records"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreIdentity:
    """What records were made from; two stores of equal identity hold the same records. All JSON-able.

    corpus: fingerprint of the one token store whose sequences they are of. packing: `PackingSpec.as_json()`. tokenizer:
    fingerprint. teacher: fingerprint of its weights, dtype, quantisation. target: the estimator and its parameters.
    temperature: that of weights, rest and entropy. seed: of the draws. forward: the shape of its forward passes, on
    which the rounding of logits depends. fields: what is stored.
    about: licence and origin of the teacher and whatever else a user should read; not compared when a store is opened.
    """

    corpus: str
    packing: Mapping[str, Any]
    tokenizer: str
    teacher: Mapping[str, Any]
    target: Mapping[str, Any]
    temperature: float
    seed: int
    forward: Mapping[str, Any]
    fields: RecordFields
    about: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As identity.json has it, with the version of the codec."""
        return {"kind": KIND, "codec": CODEC, **asdict(self)}

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> StoreIdentity:
        """The identity that `as_json` gave."""
        mine = {name: value for name, value in found.items() if name not in ("kind", "codec", "fields")}
        return cls(**mine, fields=RecordFields.of_json(found["fields"]))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a store is: sequences on disk, shards that are finished, all shards."""

    sequences: int
    finished_shards: int
    shards: int


class LogitStore:
    """Random access to the records of sequences. Thread-safe; use `open`. Does not communicate.

    identity: what the records were made from.
    """

    def __init__(self, folder: RecordFolder, identity: StoreIdentity) -> None:
        self._folder, self.identity = folder, identity

    @classmethod
    def create(cls, folder: str | Path, identity: StoreIdentity, shard: int = 0, shards: int = 1) -> LogitWriter:
        """A writer of shard `shard` of `shards`, which continues after the sequences that are on disk.

        Each shard is written by one process. Raises StoreMismatch if the folder has another identity (`about` included,
        so that the folder is the same byte for byte) or number of shards, ConfigError if another process writes the
        shard, DataError for damage or a full disk.
        """
        return LogitWriter(Path(folder), identity, shard, shards)

    @classmethod
    def open(cls, folder: str | Path, identity: StoreIdentity | None = None) -> LogitStore:
        """Open a store, finished or not; an unfinished one has the sequences that were on disk when it was opened.

        identity: what the records must have been made from; None: anything. Raises StoreMismatch, naming the first
        field that differs with both values, and DataError for damage, a newer codec or other kinds of records.
        """
        found = RecordFolder.open(folder)
        if found.identity.get("kind") != KIND:
            raise DataError(f"{folder} is a folder of records, but not of a teacher's\n  fix: name a store of logits")
        if found.identity["codec"] > CODEC:
            raise DataError(
                f"{folder}: codec {found.identity['codec']}; this kdtrain reads up to {CODEC}\n"
                "  fix: use the kdtrain that wrote it, or make the records again"
            )
        if identity is not None:
            check_identity(found.path, _compared(found.identity), _compared(identity.as_json()))
        return cls(found, StoreIdentity.of_json(found.identity))

    @property
    def path(self) -> Path:
        """Its folder."""
        return self._folder.path

    @property
    def complete(self) -> bool:
        """Whether it is finished."""
        return self._folder.complete

    @property
    def progress(self) -> Progress:
        """How far it was when it was opened."""
        ends = [journal.end is not None for journal in self._folder.journals]
        return Progress(len(self), sum(ends), len(ends))

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._folder)

    def __contains__(self, key: int) -> bool:
        """Whether the sequence of this 64-bit key (`kdtrain.stores.keys`) is there."""
        return key in self._folder

    def __getitem__(self, key: int) -> SequenceRecords:
        """The records of a sequence by its 64-bit key: two reads. KeyError without them, DataError for damage."""
        return decode(self._folder[key], self.identity.fields)

    def verify(self) -> None:
        """Read every byte and compare all checksums. DataError names the damaged file."""
        self._folder.verify()


class LogitWriter(ShardWriter):
    """Writes one shard of a store; made by `LogitStore.create`. A context manager, see `ShardWriter`."""

    def __init__(self, folder: Path, identity: StoreIdentity, shard: int, shards: int) -> None:
        self._fields = identity.fields
        super().__init__(folder, identity.as_json(), shard, shards)

    def add(self, first: int, sequences: Sequence[SequenceRecords]) -> Block:
        """Write the records of the keys first, first + 1, ... as one block; returns when it is on disk.

        Some megabytes at a time: each block costs two flushes. ValueError for records that the store's fields do not
        allow, DataError if they cannot be written; the blocks before stay.
        """
        self.append(first, [encode(records, self._fields) for records in sequences])
        return self.blocks[-1]

    def __enter__(self) -> LogitWriter:
        return self


def _compared(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name != "about"}
