"""From the token stream of a store to fixed-length sequences: S positions, the first P of them a prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import torch

from kdtrain.batch import Batch
from kdtrain.data.token_store import TokenStore
from kdtrain.documents import Documents
from kdtrain.errors import ConfigError, DataError
from kdtrain.stores.checksums import sha256_of_json
from kdtrain.stores.keys import KeySpace, SequenceKeys, first_difference

Packed = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""input_ids, labels, loss_mask, position_ids of one sequence, each [S]."""


FIRST_FIELDS = ("seq_len", "reset_positions", "sequence_prefix", "version")
"""Fields of `PackingSpec` that are always part of its fingerprint."""
_NAMES = {"sequence_prefix": "data.sequence_prefix (ids)", "version": "the version of the packing rule"}
"""Names of fields in messages; the others are keys of the section data."""


@dataclass(frozen=True, slots=True)
class PackingSpec:
    """The rule by which a stream is cut into sequences: every setting that changes a sequence or its number.

    seq_len: S. reset_positions: whether documents packed together are hidden from each other. sequence_prefix: P ids
    at the beginning of every sequence, most often one <bos> or none. version: of the rule itself, raised when the same
    settings give other sequences. A field that is added later needs a default with which nothing changes: it is
    left out of the fingerprint at that value, so that older fingerprints and records stay valid.
    ConfigError if the settings leave no room for tokens.
    """

    seq_len: int
    reset_positions: bool = True
    sequence_prefix: tuple[int, ...] = ()
    version: int = 1

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ConfigError(
                f"data.seq_len = {self.seq_len} leaves no room for tokens behind the sequence prefix "
                f"{list(self.sequence_prefix)}\n  fix: set a larger data.seq_len, or data.sequence_prefix=none"
            )

    @property
    def stride(self) -> int:
        """S - P: tokens of the stream in a sequence."""
        return self.seq_len - len(self.sequence_prefix)

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON gives them back, without later ones at their defaults; read by `first_difference`."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        later = {f.name: f.default for f in fields(self) if f.name not in FIRST_FIELDS}
        kept = {name: value for name, value in found.items() if name not in later or value != later[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}

    @property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal, of `as_json`."""
        return sha256_of_json(self.as_json())

    def difference(self, there: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
        """(name for messages, value there, value here) of the first field that differs from `there`, None without one.

        there: what `as_json` gave when records were made. A missing field has its default, as in older records; a field
        that this version does not know differs.
        """
        defaults = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
        found = first_difference({**plain, **there}, {**plain, **self.as_json()})
        return None if found is None else (_NAMES.get(found[0], f"data.{found[0]}"), *found[1:])


def num_sequences(store: TokenStore, packing: PackingSpec) -> int:
    """Complete sequences: each needs S - P tokens and the one that follows as its last label."""
    return max(0, (store.num_tokens - 1) // packing.stride)


def sequence_keys(store: TokenStore, packing: PackingSpec) -> SequenceKeys:
    """The keys of a store's sequences."""
    return SequenceKeys(store.manifest.fingerprint, packing.fingerprint)


def key_space(stores: Iterable[TokenStore], packing: PackingSpec) -> KeySpace:
    """The keys of these stores by path. Raises StoreMismatch, naming both, if two stores have the same keys."""
    return KeySpace((str(store.path), sequence_keys(store, packing)) for store in stores)


def pack(store: TokenStore, sequence: int, packing: PackingSpec) -> Packed:
    """Sequence number k = `sequence`: the prefix, then tokens [k (S - P), (k + 1) (S - P)) of the stream.

    Labels are shifted by one token. Those of the prefix do not count: the first token after it is the last label of the
    previous sequence, so every token of the stream but the first is predicted once.

    With reset_positions, position_ids restart at each document and nothing is predicted across a border: the label
    after a document's last token does not count. The prefix belongs to the document that continues in this
    sequence, whose positions begin with it. Where a document begins with the sequence, the prefix is a separate
    document, so that no document has it twice, or has it here only; if the cut is inside the document's own prefix, the
    tokens that were cut off belong to the document, and the rest of the P positions are a separate document. Without
    reset_positions the prefix comes first, and positions continue from it.

    Tokens past the end of the store are 0, with reset_positions a document of their own, and do not count. IndexError
    for a sequence that begins outside the store, DataError for a token outside the vocabulary.
    """
    start = sequence * packing.stride
    if not 0 <= start < store.num_tokens:
        raise IndexError(
            f"sequence {sequence} of {packing.stride} tokens is outside the {store.num_tokens} tokens of {store.path}"
        )
    return pack_from(store, start, packing)


def pack_from(store: TokenStore, start: int, packing: PackingSpec) -> Packed:
    """As `pack`, of the sequence that begins with token `start` of the stream, which must be in the store."""
    prefix = packing.sequence_prefix
    stop = min(start + packing.stride + 1, store.num_tokens)
    tokens = np.zeros(packing.stride + 1, dtype=np.int64)
    tokens[: stop - start] = store.tokens(start, stop)
    _check_tokens(store, start, tokens)
    joined = _joined(store, start, packing)
    apart = len(prefix) - joined
    row = np.concatenate([np.array([*prefix[:apart], *prefix[:joined]], dtype=np.int64), tokens])
    positions = np.arange(packing.seq_len, dtype=np.int64)
    mask = np.ones(packing.seq_len, dtype=np.float32)
    mask[: len(prefix)] = 0.0
    if packing.reset_positions:
        begins = store.document_starts(start, stop) - start
        begins = begins[begins > 0] + len(prefix)
        mask[begins - 1] = 0.0
        origins = np.zeros(packing.seq_len, dtype=np.int64)
        origins[apart] = apart
        inside = np.append(begins, len(prefix) + stop - start)  # padding is a separate document
        inside = inside[inside < packing.seq_len]
        origins[inside] = inside
        positions -= np.maximum.accumulate(origins)
    mask[len(prefix) + max(stop - start - 1, 0) :] = 0.0
    return row[:-1], row[1:], mask, positions


def _check_tokens(store: TokenStore, start: int, tokens: np.ndarray) -> None:
    """Raise DataError unless all are in the vocabulary; CUDA would only report a device-side assert."""
    if tokens.min() < 0 or tokens.max() >= store.manifest.vocab_size:
        bad = int(np.argmax((tokens < 0) | (tokens >= store.manifest.vocab_size)))
        raise DataError(
            f"{store.path} is damaged: token {start + bad} is {int(tokens[bad])}, not in "
            f"[0, {store.manifest.vocab_size})\n  fix: name the damaged file with TokenStore.verify, then copy it again"
        )


def _joined(store: TokenStore, start: int, packing: PackingSpec) -> int:
    """How many of the P prefix tokens belong to the document of token `start`; the others are a separate document."""
    size = len(packing.sequence_prefix)
    if not (size and packing.reset_positions):
        return size
    begins = store.document_starts(max(0, start - size + 1), start + 1)
    cut_off = start - int(begins[-1]) if len(begins) else size  # tokens of the document before `start`, at most P
    if cut_off == 0 or tuple(store.manifest.document_prefix) == packing.sequence_prefix:
        return cut_off
    return size


def stack(packed: Sequence[Packed], sample_ids: Sequence[int]) -> Batch:
    """Sequences of one length as a micro-batch on the CPU, with its documents."""
    ids, labels, mask, positions = (torch.from_numpy(np.stack(part)) for part in zip(*packed, strict=True))
    keys = torch.tensor(list(sample_ids), dtype=torch.int64)
    return Batch(ids, labels, mask, positions, keys, Documents.of(positions))
