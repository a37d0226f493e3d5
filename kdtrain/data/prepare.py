"""Text to token stores: read, tokenise in several processes, split off validation, write."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import lzma
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from kdtrain.data.token_store import Manifest, TokenStoreWriter
from kdtrain.data.tokenizer import load_tokenizer, separator_id
from kdtrain.errors import ConfigError, DataError
from kdtrain.log import LOGGER

BATCH_DOCUMENTS = 64
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".json", ".xz", ".gz")
REPORT_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class PrepareSettings:
    """How to read and cut. field: of JSON lines. errors: "strict" or "replace" for invalid UTF-8. validation_share: of
    documents, chosen by a hash of their text. workers: processes; None: one per core."""

    field: str = "text"
    errors: str = "strict"
    validation_share: float = 0.0
    separator: str | None = None
    workers: int | None = None


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Files named by paths and folders (searched recursively), in a fixed order, each once. ConfigError if none."""
    found: dict[Path, None] = {}
    for entry in map(Path, inputs):
        if entry.is_dir():
            found.update(
                dict.fromkeys(sorted(p for p in entry.rglob("*") if p.is_file() and p.suffix in TEXT_SUFFIXES))
            )
        elif entry.is_file():
            found[entry] = None
        else:
            raise ConfigError(
                f"{entry} does not exist\n  fix: name text files, .jsonl files (also .xz, .gz) or folders"
            )
    if not found:
        raise ConfigError(f"no text in {', '.join(map(str, inputs))} (looked for {', '.join(TEXT_SUFFIXES)})")
    return list(found)


def _open(path: Path) -> IO[bytes]:
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    return opener(path, "rb")  # type: ignore[no-any-return]


def read_documents(files: Iterable[Path], settings: PrepareSettings) -> Iterator[str]:
    """Texts in order: one per line of a JSON-lines file, one per other file. Empty texts are left out.

    Raises DataError naming file and place: invalid UTF-8, malformed JSON, a missing field, a damaged archive.
    """
    for path in files:
        is_json = ".jsonl" in path.suffixes or path.suffix == ".json"
        try:
            with _open(path) as file:
                texts = (
                    _json_lines(path, file, settings) if is_json else iter([_decode(path, file.read(), 0, settings)])
                )
                yield from (text for text in texts if text.strip())
        except (OSError, lzma.LZMAError, EOFError) as error:
            raise DataError(f"{path}: cannot be read: {error}\n  fix: copy the file again") from error


def _decode(path: Path, data: bytes, offset: int, settings: PrepareSettings) -> str:
    try:
        return data.decode("utf-8", errors=settings.errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: invalid UTF-8 at byte {offset + error.start} ({data[error.start : error.start + 4].hex(' ')})\n"
            "  why: silently replaced characters would be learned\n"
            "  fix: convert the file (iconv -t UTF-8), or accept replacement characters with --errors replace"
        ) from error


def _json_lines(path: Path, file: IO[bytes], settings: PrepareSettings) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(file, start=1):
        text = _decode(path, line, offset, settings)
        offset += len(line)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error.msg}\n  fix: one JSON object per line") from error
        value = record.get(settings.field) if isinstance(record, dict) else None
        if not isinstance(value, str):
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{path}:{number}: no text under {settings.field!r} (found {keys})\n  fix: name it with --field"
            )
        yield value


def is_validation(text: str, share: float) -> bool:
    """Whether a document belongs to validation: by a hash of its text, so the same in any order and any corpus."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") < share * 2.0**64


def prepare_corpus(
    inputs: Sequence[str | Path], tokenizer_dir: str | Path, output: str | Path, settings: PrepareSettings
) -> dict[str, Manifest]:
    """Write <output>/train and, if asked for, <output>/validation. Both appear at the end or neither is touched.

    Deterministic: the stores' bytes do not depend on the number of workers. Raises ConfigError or DataError with the
    file and place.
    """
    output = Path(output)
    tokenizer = load_tokenizer(tokenizer_dir)
    separator = separator_id(tokenizer_dir, tokenizer, settings.separator)
    files = find_files(inputs)
    source = f"{len(files)} files: " + ", ".join(p.name for p in files[:8]) + (", ..." if len(files) > 8 else "")
    names = ["train", "validation"] if settings.validation_share > 0 else ["train"]
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(TokenStoreWriter(output / name, tokenizer_dir, separator, source=source))
            for name in names
        }
        with _progress() as report:
            texts = read_documents(files, settings)
            for text, ids in _tokenised(texts, Path(tokenizer_dir), settings.workers or os.cpu_count() or 1):
                held_out = len(names) > 1 and is_validation(text, settings.validation_share)
                size = len(text.encode("utf-8", "surrogatepass"))
                writers["validation" if held_out else "train"].add(ids, size)
                report(len(ids) + 1)
        return {name: writer.commit() for name, writer in writers.items()}


_WORKER: dict[str, Any] = {}
"""The tokenizer of a worker process, set once by its initialiser."""


def _start_worker(folder: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER["tokenizer"] = load_tokenizer(folder)


def _encode(texts: list[str]) -> list[np.ndarray]:
    encoded = _WORKER["tokenizer"].encode_batch(texts, add_special_tokens=False)
    return [np.asarray(e.ids, dtype=np.int32) for e in encoded]


def _tokenised(texts: Iterable[str], folder: Path, workers: int) -> Iterator[tuple[str, np.ndarray]]:
    """(text, ids) in the order of `texts`, whatever the number of workers."""
    source = iter(texts)
    batches = iter(lambda: list(itertools.islice(source, BATCH_DOCUMENTS)), [])
    if workers == 1:
        _start_worker(str(folder))
        for batch in batches:
            yield from zip(batch, _encode(batch), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=_start_worker, initargs=(str(folder),)) as pool:
        waiting: list[tuple[list[str], Any]] = []
        for batch in batches:
            waiting.append((batch, pool.apply_async(_encode, (batch,))))
            if len(waiting) >= 4 * workers:
                first, answer = waiting.pop(0)
                yield from zip(first, answer.get(), strict=True)
        for first, answer in waiting:
            yield from zip(first, answer.get(), strict=True)


@contextmanager
def _progress() -> Iterator[Any]:
    """A function to call with the tokens of each document; a bar on a terminal, else a line every ten seconds."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    documents = tokens = 0
    console = Console()
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("reading")

            def show(count: int) -> None:
                nonlocal documents, tokens
                documents, tokens = documents + 1, tokens + count
                bar.update(task, description=f"{documents:,} documents, {tokens:,} tokens")

            yield show
        return
    last = time.monotonic()

    def line(count: int) -> None:
        nonlocal documents, tokens, last
        documents, tokens = documents + 1, tokens + count
        if time.monotonic() - last > REPORT_EVERY_S:
            last = time.monotonic()
            LOGGER.info("prepare  %s documents, %s tokens", f"{documents:,}", f"{tokens:,}")

    yield line
