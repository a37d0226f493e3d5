"""Megatron pairs to token stores: copied in blocks, or used in place where no token needs to change."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from kdtrain.data.manifest import Manifest, token_dtype
from kdtrain.data.megatron_pair import DOCUMENTS_FROM, INNER, Documents, Marks, Pair, begun, find_documents, open_pair
from kdtrain.data.prepare import progress, report_left_out
from kdtrain.data.separator import document_borders
from kdtrain.data.text_bytes import TextBytes
from kdtrain.data.token_store import TokenStoreWriter
from kdtrain.data.tokenizer import load_tokenizer, prefix_of, size_of, tokenizer_file
from kdtrain.errors import ConfigError, DataError
from kdtrain.log import LOGGER
from kdtrain.stores.checksums import sha256_of

BLOCK_TOKENS = 1 << 21
"""Tokens per task of a thread; bounds memory and does not change the result."""
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class MegatronSettings:
    """separator, bos: as in `kdtrain.data.prepare.PrepareSettings`. documents_from, inner_separators: see
    `kdtrain.data.megatron_pair.find_documents`. in_place: refer to the pairs' tokens instead of copying them."""

    separator: str | None = None
    bos: str = "auto"
    documents_from: str | None = None
    inner_separators: str | None = None
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class _Target:
    """Format of a store's documents. prefix, separator: around each; dtype, vocab_size: of its tokens."""

    prefix: tuple[int, ...]
    separator: int
    dtype: np.dtype
    vocab_size: int
    text: TextBytes


def import_megatron(
    prefixes: Sequence[str | Path],
    tokenizer_dir: str | Path,
    output: str | Path,
    settings: MegatronSettings | None = None,
) -> dict[str, Manifest]:
    """Write <output>/train from Megatron pairs PREFIX.bin and PREFIX.idx, which do not name their tokenizer.

    Each document gets one prefix and one separator unless it has them. The size of the text is that of the decoded
    tokens. In place only indices are written: every token of the pairs is read, and no token may need a change. Raises
    DataError for damaged or ambiguous pairs, ids outside the vocabulary, or, in place, pairs that need a change.
    """
    settings = MegatronSettings() if settings is None else settings
    twice = [name for name, count in Counter(os.path.realpath(path) for path in prefixes).items() if count > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is named twice\n  why: every document would occur twice\n  fix: name it once")
    marks, target = _marks_and_target(Path(tokenizer_dir), settings)
    left_out: Counter[str] = Counter()
    folder, source = Path(output) / "train", "Megatron " + ", ".join(Path(name).name for name in prefixes)
    writing = TokenStoreWriter(folder, tokenizer_dir, target.separator, source=source, document_prefix=target.prefix)
    with writing as writer, progress() as report:
        for path in map(Path, prefixes):
            pair = open_pair(path)
            documents = find_documents(pair, marks, settings.documents_from, settings.inner_separators)
            _log_documents(pair, documents, marks, settings)
            left_out["empty documents"] += documents.empty
            if settings.in_place:
                _link(writer, pair, documents, target, report)
            else:
                _copy(writer, pair, documents, target, report)
        report_left_out(left_out)
        return {"train": writer.commit(left_out)}


def _marks_and_target(folder: Path, settings: MegatronSettings) -> tuple[Marks, _Target]:
    for name, value, known in (
        ("documents_from", settings.documents_from, DOCUMENTS_FROM),
        ("inner_separators", settings.inner_separators, INNER),
    ):
        if value is not None and value not in known:
            raise ConfigError(f"{name} = {value!r} is not known\n  fix: use one of {', '.join(known)}")
    if settings.documents_from == "stream" and settings.inner_separators == "keep":
        raise ConfigError(
            "documents_from = 'stream' cannot be used with inner_separators = 'keep'\n"
            "  why: documents of a stream end at separators, so none is inside\n"
            "  fix: leave out --inner-separators, or use --documents-from index or sequences"
        )
    tokenizer, file = load_tokenizer(folder), tokenizer_file(folder)
    separator, found = document_borders(folder, tokenizer, settings.separator, settings.bos)
    size, prefix = size_of(tokenizer, file), tuple(found)
    special = {number: str(token) for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    usual = tuple(prefix_of(tokenizer, file))
    text = TextBytes(tokenizer, size, prefix, separator.id)
    if not text.by_table:
        LOGGER.info("prepare  the size of the text is measured by decoding every document (no table for this decoder)")
    marks = Marks(separator.id, separator.token, settings.separator is not None, prefix, usual, special)
    return marks, _Target(prefix, separator.id, np.dtype(token_dtype(size)), size, text)


def _log_documents(pair: Pair, documents: Documents, marks: Marks, settings: MegatronSettings) -> None:
    how = {"stream": "joined as one stream, documents end at separators", "sequences": "each a document"}
    found = (
        f"{len(documents.starts):,} documents of {len(pair.index.sizes):,} sequences "
        f"({how.get(settings.documents_from or '', 'by the document index')})"
    )
    if settings.inner_separators == "split" and settings.documents_from != "stream":
        found += ", cut after each separator inside"
    unended = int(np.count_nonzero(~documents.ended))
    if unended:
        found += f"; {unended:,} had no separator {marks.separator_name} at the end; one is added to each"
    begins = np.unique(pair.tokens[documents.starts]).tolist()
    if len(begins) == 1 and begins[0] in marks.special and begins[0] not in marks.prefix[:1]:
        found += f"; each begins with {marks.special[begins[0]]} (token {begins[0]}), which counts as text"
    LOGGER.info("prepare  %s: %s", pair.prefix, found)


def _copy(
    writer: TokenStoreWriter, pair: Pair, documents: Documents, target: _Target, report: Callable[[int, int], None]
) -> None:
    """Write a pair's documents, in blocks on several threads (numpy and the tokenizer release Python's lock)."""

    def assemble(block: slice) -> tuple[np.ndarray, np.ndarray, int]:
        tokens, sizes = _with_borders(
            pair.tokens, documents.starts[block], documents.stops[block], documents.ended[block], target
        )
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= target.vocab_size):
            return tokens, sizes, 0  # the writer raises, with the number of the document
        return tokens.astype(target.dtype, copy=False), sizes, target.text.measure(tokens, sizes)

    for tokens, sizes, text_bytes in _in_order(assemble, _blocks(documents)):
        writer.add_block(tokens, sizes, text_bytes)
        report(len(tokens), len(sizes))


def _with_borders(
    tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray, ended: np.ndarray, target: _Target
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and sizes of the documents, each with exactly one prefix and separator. A view if nothing changes."""
    first = int(starts[0])
    source = tokens[first : int(stops[-1])]
    have = begun(tokens, starts, stops - ended, target.prefix)
    sizes = stops - starts + ~ended + len(target.prefix) * ~have
    if have.all() and ended.all() and (starts[1:] == stops[:-1]).all():
        return source, sizes
    begins, ends = starts + len(target.prefix) * have - first, stops - ended - first
    kept = np.ones(len(source), dtype=bool)
    kept[_ranges(np.concatenate([[0], ends]), np.concatenate([begins, [len(source)]]))] = False
    content = source[kept]
    out = np.empty(int(sizes.sum()), dtype=np.promote_types(content.dtype, target.dtype))
    last = np.cumsum(sizes) - 1
    free = np.ones(len(out), dtype=bool)
    for place, token in [(last, target.separator), *((last - sizes + 1 + n, t) for n, t in enumerate(target.prefix))]:
        out[place], free[place] = token, False
    out[free] = content
    return out, sizes


def _ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """All integers of the ranges [starts, stops), one range after the other."""
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    found: np.ndarray = np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
    return found


def _blocks(documents: Documents) -> Iterator[slice]:
    """Ranges of documents of at most BLOCK_TOKENS tokens together, of at least one document."""
    first, total = 0, len(documents.starts)
    while first < total:
        stop = int(np.searchsorted(documents.stops, documents.starts[first] + BLOCK_TOKENS, side="right"))
        stop = max(stop, first + 1)
        yield slice(first, stop)
        first = stop


def _in_order(work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """Results in the order of `items`, from one thread per core; at most two per core wait for the consumer."""
    workers = len(os.sched_getaffinity(0))
    waiting: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _link(
    writer: TokenStoreWriter, pair: Pair, documents: Documents, target: _Target, report: Callable[[int, int], None]
) -> None:
    """Link a pair's tokens after reading all of them. Raises DataError if a token would have to change."""
    _check_in_place(pair, documents, target)
    if len(documents.starts) == 0:
        return

    seen = np.zeros(target.vocab_size, dtype=bool)

    def measure(block: slice) -> tuple[int, int, int]:
        starts, stops = documents.starts[block], documents.stops[block]
        tokens = pair.tokens[int(starts[0]) : int(stops[-1])]
        if tokens.min() < 0 or tokens.max() >= target.vocab_size:
            raise _outside(pair, int(starts[0]), tokens, target.vocab_size)
        seen[tokens] = True
        return len(tokens), len(starts), target.text.measure(tokens, stops - starts)

    with ThreadPoolExecutor(1) as hasher:
        digest = hasher.submit(sha256_of, pair.bin)
        text_bytes = 0
        for tokens, count, measured in _in_order(measure, _blocks(documents)):
            text_bytes += measured
            report(tokens, count)
        sizes = documents.stops - documents.starts
        writer.link_shard(pair.bin, sizes, digest.result(), pair.modified_ns, text_bytes, seen)


def _check_in_place(pair: Pair, documents: Documents, target: _Target) -> None:
    starts, stops = documents.starts, documents.stops
    unbegun = ~begun(pair.tokens, starts, stops - documents.ended, target.prefix)
    problems = []
    if pair.tokens.dtype != target.dtype:
        problems.append(f"its tokens are {pair.tokens.dtype}, a store of this vocabulary holds {target.dtype}")
    for wrong, what in (
        (~documents.ended, f"do not end with the separator (token {target.separator})"),
        (unbegun, f"do not begin with the prefix (tokens {list(target.prefix)}; --bos never leaves it out)"),
    ):
        if wrong.any():
            problems.append(
                f"{np.count_nonzero(wrong):,} of {len(starts):,} documents {what}; the first is {int(np.argmax(wrong))}"
            )
    if np.sum(stops - starts) != len(pair.tokens):
        problems.append(f"{documents.empty:,} documents hold nothing but a separator, which a store leaves out")
    if problems:
        raise DataError(
            f"{pair.bin} cannot be used in place: {'; '.join(problems)}\n"
            "  why: in place no token changes, and each document of a store has one prefix, one separator, one dtype\n"
            "  fix: leave out --in-place, then the pair is copied with these changes"
        )


def _outside(pair: Pair, first: int, tokens: np.ndarray, size: int) -> DataError:
    place = int(np.argmax((tokens < 0) | (tokens >= size)))
    return DataError(
        f"{pair.bin}: token {first + place} is {int(tokens[place])}, not in [0, {size}), the tokenizer's vocabulary\n"
        "  fix: name the tokenizer that made the tokens"
    )
