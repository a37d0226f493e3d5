"""Number of UTF-8 bytes that a token stream decodes to, for bits per byte.

Where a tokenizer's decoder allows it (byte-level, and SentencePiece's with byte fallback), the bytes of a token do not
depend on its neighbours, unless it holds a part of a character. The former are looked up in a table for millions of
tokens at once, the latter are decoded run by run. Other decoders decode document by document, on all cores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from tokenizers import Tokenizer

DECODED_AT_ONCE = 64
"""Documents of one call of decode_batch."""
LOOKED_UP_AT_ONCE = 1 << 17
"""Tokens, so that temporaries stay in a core's cache."""
_SPACE = "\u2581"
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_SPACES = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
_SENTENCEPIECE = [_SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


@dataclass(frozen=True, slots=True)
class _Table:
    """Per id. lengths [V] int32: UTF-8 bytes of its text, -1 if they depend on its neighbours, which need `raw`.

    byte_fallback: bytes of a run that are not UTF-8 become one U+FFFD each, not one per broken character.
    strips: the decoder takes a space from the beginning of a document.
    """

    lengths: np.ndarray
    raw: list[bytes]
    byte_fallback: bool
    strips: bool


class TextBytes:
    """Measures documents of one tokenizer; equal to len(decode(ids, skip_special_tokens=False).encode()) of each.

    vocab_size: ids are below it. prefix, separator: tokens around each document, whose text does not count. by_table:
    whether lengths are looked up (10^8 tokens a second) or texts decoded (10^6 a second and core). Thread-safe.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, prefix: Sequence[int], separator: int) -> None:
        self._tokenizer = tokenizer
        self._prefix = len(prefix)
        table = _make_table(tokenizer, vocab_size)
        around = [*prefix, separator]
        if table is not None and (table.lengths[around] < 0).any():
            table = None  # such a border would join runs of two documents
        self._table = table
        self._around = 0 if table is None else int(table.lengths[around].sum())

    @property
    def by_table(self) -> bool:
        """Whether no document needs to be decoded."""
        return self._table is not None

    def measure(self, tokens: np.ndarray, sizes: np.ndarray) -> int:
        """Bytes of documents of `sizes` tokens, prefix and separator included, one after the other in `tokens`."""
        stops = np.cumsum(sizes)
        first, last = stops - sizes + self._prefix, stops - 1
        if self._table is None:
            return self._decoded(tokens, first, last)
        total = _looked_up(self._table, tokens) - len(sizes) * self._around
        return total - self._stripped(self._table, tokens, first, last)

    def _stripped(self, table: _Table, tokens: np.ndarray, first: np.ndarray, last: np.ndarray) -> int:
        """Spaces that the decoder takes from the beginning of documents."""
        if not table.strips:
            return 0
        first, last = first[first < last], last[first < last]
        ids, places = np.unique(tokens[first], return_inverse=True)
        begins = np.array([table.raw[token].startswith(b" ") for token in ids.tolist()], dtype=bool)
        unclear = table.lengths[ids][places] < 0  # a byte whose meaning depends on its run
        exact = sum(
            _looked_up(table, tokens[a:b]) - self._decoded(tokens, np.array([a]), np.array([b]))
            for a, b in zip(first[unclear].tolist(), last[unclear].tolist(), strict=True)
        )
        return exact + int(np.count_nonzero(begins[places] & ~unclear))

    def _decoded(self, tokens: np.ndarray, first: np.ndarray, last: np.ndarray) -> int:
        total = 0
        for begin in range(0, len(first), DECODED_AT_ONCE):
            borders = zip(first[begin : begin + DECODED_AT_ONCE], last[begin : begin + DECODED_AT_ONCE], strict=True)
            texts = self._tokenizer.decode_batch([tokens[a:b].tolist() for a, b in borders], skip_special_tokens=False)
            total += sum(len(text.encode()) for text in texts)
        return total


def _looked_up(table: _Table, tokens: np.ndarray) -> int:
    """Bytes of all tokens, borders included. A border is complete text, so no run crosses it."""
    total = 0
    partial: list[np.ndarray] = []
    for begin in range(0, len(tokens), LOOKED_UP_AT_ONCE):
        lengths = table.lengths.take(tokens[begin : begin + LOOKED_UP_AT_ONCE])
        total += int(lengths.sum(dtype=np.int64))
        if lengths.min() < 0:
            partial.append(np.flatnonzero(lengths < 0) + begin)
    if not partial:
        return total
    places = np.concatenate(partial)
    pieces = [table.raw[token] for token in tokens[places].tolist()]
    edges = np.append(np.flatnonzero(np.diff(places, prepend=-2) != 1), len(places)).tolist()
    runs = [b"".join(pieces[first:last]) for first, last in pairwise(edges)]
    return total + len(places) + _decoded_length(runs, table.byte_fallback)


def _decoded_length(runs: list[bytes], byte_fallback: bool) -> int:
    """Bytes of UTF-8 of runs that are decoded each by itself."""
    if not byte_fallback:  # an ASCII byte between runs separates them
        return len(b"\n".join(runs).decode("utf-8", "replace").encode()) - (len(runs) - 1)
    return sum(len(run) if _is_utf8(run) else len(run) * len("\ufffd".encode()) for run in runs)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _make_table(tokenizer: Tokenizer, vocab_size: int) -> _Table | None:
    """The table of a supported decoder; None for others."""
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {}
    tokens = [tokenizer.id_to_token(token) for token in range(vocab_size)]
    if decoder.get("type") == "ByteLevel":
        raw = _byte_level(tokens)
        lengths = [len(data) if data and _is_utf8(data) else -1 for data in raw]
        return _Table(np.array(lengths, dtype=np.int32), raw, byte_fallback=False, strips=False)
    steps = [step for step in decoder.get("decoders", []) if decoder.get("type") == "Sequence"]
    if steps[:3] != _SENTENCEPIECE or steps[3:] not in ([], [_STRIP]) or "" in tokens:
        return None
    single = [token is None or _BYTE.fullmatch(token) is not None for token in tokens]
    raw = [
        b"" if token is None else bytes([int(token[3:5], 16)]) if partial else token.replace(_SPACE, " ").encode()
        for token, partial in zip(tokens, single, strict=True)
    ]
    lengths = [-1 if partial else len(data) for data, partial in zip(raw, single, strict=True)]
    return _Table(np.array(lengths, dtype=np.int32), raw, byte_fallback=True, strips=bool(steps[3:]))


def _byte_level(tokens: Sequence[str | None]) -> list[bytes]:
    """Bytes of each token in GPT-2's alphabet, in which each byte is a printable character; b"" where there is none."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    to_byte = {byte: byte for byte in printable} | {256 + place: byte for place, byte in enumerate(others)}
    alphabet, as_latin_1 = {chr(code) for code in to_byte}, {code: chr(byte) for code, byte in to_byte.items()}
    # A token with a character outside the alphabet, such as an added token of white space, is plain text.
    return [
        token.translate(as_latin_1).encode("latin-1") if alphabet.issuperset(token) else token.encode()
        for token in (token or "" for token in tokens)
    ]
