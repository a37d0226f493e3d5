"""A Megatron pair PREFIX.bin and PREFIX.idx made elsewhere: where its documents begin and end, found in its tokens.

The index alone is not enough: builders pack several texts into one entry, cut rows anywhere from a stream of texts, or
never end a document. So separators are counted, and ambiguous pairs are refused unless the caller decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdtrain.data.megatron_index import DTYPES, MegatronIndex, read_index
from kdtrain.errors import ConfigError, DataError

DOCUMENTS_FROM, INNER = ("index", "sequences", "stream"), ("split", "keep")
SCANNED_AT_ONCE = 1 << 22
SPLIT = (
    "cut documents after each separator inside with --inner-separators split, or keep them whole with "
    "--inner-separators keep"
)
JOIN = "join rows cut from a stream of texts with --documents-from stream"
WHOLE = "if each entry of the document index is one document, use --documents-from index"


@dataclass(frozen=True, slots=True)
class Pair:
    """prefix: its path without suffix. tokens: all of the .bin, mapped. edges [n + 1] int64: where sequences begin.

    modified_ns: when the .bin was last changed, before any of it was read.
    """

    prefix: Path
    index: MegatronIndex
    tokens: np.ndarray
    edges: np.ndarray
    modified_ns: int

    @property
    def bin(self) -> Path:
        """The file of tokens."""
        return self.prefix.with_name(self.prefix.name + ".bin")

    @property
    def idx(self) -> Path:
        """The index."""
        return self.prefix.with_name(self.prefix.name + ".idx")


@dataclass(frozen=True, slots=True)
class Documents:
    """Ranges [starts, stops) of a pair's tokens, ascending, none empty; ended [documents] bool: the last token is the
    separator. empty: number of other ranges without tokens, or with only a separator where entries were split."""

    starts: np.ndarray
    stops: np.ndarray
    ended: np.ndarray
    empty: int = 0


@dataclass(frozen=True, slots=True)
class Marks:
    """Tokens that end and begin documents. separator_named: the caller chose it. special: names of special tokens.

    prefix: tokens before each document; usual_prefix: those that the tokenizer itself puts before a text.
    """

    separator: int
    separator_name: str
    separator_named: bool
    prefix: tuple[int, ...]
    usual_prefix: tuple[int, ...]
    special: dict[int, str]


def open_pair(prefix: Path) -> Pair:
    """Map a pair and check its index and sizes. Raises DataError, ConfigError if there is no such pair."""
    path = _index_of(prefix)
    index = read_index(path)
    index.check(path)
    if index.dtype.kind not in "iu":
        kinds = [np.dtype(kind).name for kind in DTYPES.values() if np.dtype(kind).kind in "iu"]
        raise DataError(
            f"{path}: its sequences are {index.dtype}, which are not token ids\n"
            f"  fix: build the pair again with one of {', '.join(kinds)}"
        )
    data = prefix.with_name(prefix.name + ".bin")
    expected, found = index.num_tokens * index.dtype.itemsize, data.stat().st_size if data.is_file() else -1
    modified = data.stat().st_mtime_ns if data.is_file() else 0
    if found != expected:
        what = "is missing" if found < 0 else f"has {found} bytes"
        raise DataError(f"{data} {what}, {path.name} describes {expected}\n  fix: copy the pair again")
    tokens = np.asarray(np.memmap(data, mode="r", dtype=index.dtype)) if expected else np.zeros(0, index.dtype)
    edges = np.append(np.asarray(index.pointers), expected) // index.dtype.itemsize
    return Pair(prefix, index, tokens, edges, modified)


def _index_of(prefix: Path) -> Path:
    if prefix.name and (found := prefix.with_name(prefix.name + ".idx")).exists():
        return found
    is_file = prefix.suffix in (".bin", ".idx") and prefix.with_suffix(".idx").exists()
    raise ConfigError(
        f"{prefix} is not the prefix of a Megatron pair: {prefix}.idx does not exist\n"
        f"  fix: name {prefix.with_suffix('') if is_file else 'the path of a .bin and its .idx'} without either suffix"
    )


def find_documents(pair: Pair, marks: Marks, documents_from: str | None, inner: str | None) -> Documents:
    """The documents of a pair.

    documents_from: "index" (its document index), "sequences" (each is a document), "stream" (sequences are pieces of
    one stream, in which documents end with the separator); None: "index", refused where the tokens contradict it.
    inner: treatment of entries with separators inside: "split" after each, "keep" as one document, None: refused.
    Raises DataError.
    """
    if documents_from == "stream":
        edges = pair.edges[[0, -1]]
    else:
        edges = pair.edges if documents_from == "sequences" else pair.edges[_document_index(pair)]
    starts, stops = edges[:-1][np.diff(edges) > 0], edges[1:][np.diff(edges) > 0]
    empty = len(edges) - 1 - len(starts)
    if len(starts) == 0:
        return Documents(starts, stops, np.zeros(0, dtype=bool), empty)
    separators = _places(pair.tokens, marks.separator)
    ended = pair.tokens[stops - 1] == marks.separator
    if documents_from == "stream":
        if len(separators) == 0:
            raise _no_separator(pair, marks)
        return _cut(starts, stops, separators, empty)
    inside = np.setdiff1d(separators, stops[ended] - 1, assume_unique=True)
    problems = _piece_problems(pair, marks, starts, stops, ended) if documents_from is None else []
    if inner is None and len(inside):
        problems.append(_inner_problem(starts, inside, marks, documents_from))
    if problems:
        raise _ambiguous(pair, problems)
    if inner == "split" and len(inside):
        return _cut(starts, stops, separators, empty)
    return Documents(starts, stops, ended, empty)


def _document_index(pair: Pair) -> np.ndarray:
    """The document index: from 0 to the number of sequences, ascending. Raises DataError that names the fault."""
    found, count = np.asarray(pair.index.documents), len(pair.index.sizes)
    if count == 0 and found.max(initial=0) == 0:
        return np.zeros(1, dtype=np.int64)
    falls = np.flatnonzero(np.diff(found) < 0)
    fix = (
        "build the pair again, or take each sequence as a document with --documents-from sequences, or sequences as "
        "pieces of one stream, whose documents end with the separator, with --documents-from stream"
    )
    if count and (len(found) == 0 or found.tolist() == [0]):
        what = f"no document was ever ended: its document index is {found.tolist()} over {count} sequences"
    elif found[0] != 0:
        what = f"its document index begins with sequence {found[0]}, not 0"
    elif len(falls):
        where = int(falls[0])
        what = f"its document index is not in order: entry {where + 1} is {found[where + 1]}, after {found[where]}"
    elif found[-1] != count:
        what = f"its document index does not divide its {count} sequences: it ends with {found[-1]}"
    else:
        return found
    raise DataError(f"{pair.idx}: {what}\n  why: it does not define which sequences are one text\n  fix: {fix}")


def _places(tokens: np.ndarray, token: int) -> np.ndarray:
    """Positions of a token, ascending, int64."""
    parts = [
        np.flatnonzero(tokens[begin : begin + SCANNED_AT_ONCE] == token) + begin
        for begin in range(0, len(tokens), SCANNED_AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _cut(starts: np.ndarray, stops: np.ndarray, separators: np.ndarray, empty: int) -> Documents:
    """Documents that end at every separator and every former end; those with only a separator are counted."""
    ends = np.union1d(stops, separators + 1)
    begins = np.concatenate([starts[:1], ends[:-1]])
    ended = np.isin(ends, separators + 1, assume_unique=True)
    kept = ~(ended & (ends - begins == 1))
    return Documents(begins[kept], ends[kept], ended[kept], empty + int(np.count_nonzero(~kept)))


def _inner_problem(
    starts: np.ndarray, inside: np.ndarray, marks: Marks, documents_from: str | None
) -> tuple[str, list[str]]:
    """(description of the fault, options that resolve it)."""
    holders = np.unique(np.searchsorted(starts, inside, side="right") - 1)
    what = (
        f"{len(holders):,} of {len(starts):,} documents hold the separator {marks.separator_name} (token "
        f"{marks.separator}) inside, {len(inside):,} times; the first is document {holders[0]}"
    )
    return what, [SPLIT] if documents_from else [SPLIT, JOIN]


def _piece_problems(
    pair: Pair, marks: Marks, starts: np.ndarray, stops: np.ndarray, ended: np.ndarray
) -> list[tuple[str, list[str]]]:
    """(fault, options that resolve it) for entries that, by their first and last tokens, may not be whole texts."""
    continued = ~ended[:-1] & ~_begin_with(pair.tokens, starts[1:], stops[1:], marks.usual_prefix)
    sizes = stops - starts
    if ended.any():
        if not continued.any():
            return []
        what = (
            f"{np.count_nonzero(~ended):,} of {len(starts):,} documents do not end with the separator "
            f"{marks.separator_name} though others do; the first is document {int(np.argmin(ended))}"
        )
        return [(what, [JOIN, WHOLE])]
    if len(starts) >= 3 and (sizes[:-1] == sizes[0]).all() and sizes[-1] <= sizes[0] and continued.any():
        what = f"none ends with the separator {marks.separator_name}, and all but the last have {sizes[0]} tokens"
        return [(what, [JOIN, WHOLE])]
    last = int(pair.tokens[stops[-1] - 1])
    same_end = len(starts) >= 2 and bool((pair.tokens[stops - 1] == last).all())
    if same_end and last in marks.special and not marks.separator_named:
        what = (
            f"every document ends with {marks.special[last]} (token {last}), none with the separator "
            f"{marks.separator_name}"
        )
        fix = (
            f"take the former as the separator with --separator {marks.special[last]!r}, or add the latter behind it "
            f"with --separator {marks.separator_name!r}"
        )
        return [(what, [fix])]
    return []


def _begin_with(tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray, prefix: tuple[int, ...]) -> np.ndarray:
    """Which documents begin with a prefix [documents] bool; none if it is empty."""
    if not prefix:
        return np.zeros(len(starts), dtype=bool)
    return begun(tokens, starts, stops, prefix)


def begun(tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray, prefix: tuple[int, ...]) -> np.ndarray:
    """Which ranges [starts, stops) begin with all of a prefix [documents] bool; all if it is empty."""
    found: np.ndarray = stops - starts >= len(prefix)
    for place, token in enumerate(prefix):
        found = found & (tokens[np.minimum(starts + place, len(tokens) - 1)] == token)
    return found


def _no_separator(pair: Pair, marks: Marks) -> DataError:
    return DataError(
        f"{pair.prefix}: no token of its {len(pair.tokens):,} is the separator {marks.separator_name} (token "
        f"{marks.separator})\n  why: a stream without separators would be one document\n"
        "  fix: name the token that ends documents with --separator TOKEN"
    )


def _ambiguous(pair: Pair, problems: list[tuple[str, list[str]]]) -> DataError:
    fixes = dict.fromkeys(part for _, fix in problems for part in fix)
    return DataError(
        f"{pair.prefix}: its documents may not be single texts: {'; '.join(what for what, _ in problems)}\n"
        "  why: attention crosses between texts in one document, and a model learns to end texts where they were cut\n"
        f"  fix: {'; '.join(fixes)}"
    )
