"""Text to token stores: tokenise in several processes, split off validation, write. `kdtrain.data.text` reads."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from kdtrain.data.manifest import Manifest
from kdtrain.data.megatron_pair import INNER
from kdtrain.data.separator import Separator, document_borders
from kdtrain.data.text import find_files, read_documents
from kdtrain.data.token_store import TokenStoreWriter
from kdtrain.data.tokenizer import load_tokenizer
from kdtrain.errors import ConfigError, DataError
from kdtrain.log import LOGGER

BATCH_DOCUMENTS, BATCH_CHARACTERS = 64, 1 << 20
"""Limits of a worker's portion; they bound memory and do not change the result."""
REPORT_EVERY_S = 10.0
Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PrepareSettings:
    """How to read and cut.

    field: of JSON lines. errors: "strict", or "replace" for invalid UTF-8. validation_share: of documents, chosen by a
    hash of their text. separator: token after each document, None as `kdtrain.data.separator.choose_separator` does.
    workers: processes; None: one per core this process may use. split_on: line between documents of a text file
    (`kdtrain.data.text.read_documents`), None: a text file is one document. bos: "auto" puts before each document what
    the tokenizer's post-processor puts there, "never" nothing, else it is a token. skip_invalid: leave out, and count
    by reason, documents that cannot be read. inner_separators: of a text that holds the separator inside, "split" cuts
    after each, "keep" leaves it one document, None is an error; one at the end is that of the document.
    """

    field: str = "text"
    errors: str = "strict"
    validation_share: float = 0.0
    separator: str | None = None
    workers: int | None = None
    split_on: str | None = None
    bos: str = "auto"
    skip_invalid: bool = False
    inner_separators: str | None = None


def is_validation(text: str, share: float) -> bool:
    """Whether a document belongs to validation: by a hash of its text, so the same in any order and any corpus."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2.0**64


def prepare_corpus(
    inputs: Sequence[str | Path], tokenizer_dir: str | Path, output: str | Path, settings: PrepareSettings
) -> dict[str, Manifest]:
    """Write <output>/train and, if validation_share > 0, <output>/validation.

    Neither appears before both are complete. They are renamed one after the other, validation first: a kill between
    the two renames leaves a complete validation/ without train/, and the next call raises until it is removed.
    The stores' bytes do not depend on the number of workers. Raises ConfigError or DataError with the file and place,
    DataError when a store would be empty.
    """
    _check(settings)
    tokenizer = load_tokenizer(tokenizer_dir)
    separator, prefix = document_borders(tokenizer_dir, tokenizer, settings.separator, settings.bos)
    ignored, left_out = Counter[str](), Counter[str]()
    files = find_files(inputs, ignored)
    source = f"{len(files)} files: " + ", ".join(p.name for p in files[:8]) + (", ..." if len(files) > 8 else "")
    names = ["train", "validation"] if settings.validation_share > 0 else ["train"]
    with ExitStack() as stack:
        writers = {}
        for name in names:
            folder = Path(output) / name
            writer = TokenStoreWriter(folder, tokenizer_dir, separator.id, source=source, document_prefix=prefix)
            writers[name] = stack.enter_context(writer)
        report = stack.enter_context(progress())
        for text, ids in _documents(files, Path(tokenizer_dir), settings, left_out):
            held_out = len(names) > 1 and is_validation(text, settings.validation_share)
            for part, text_bytes in _parts(text, ids, separator, tokenizer, settings.inner_separators):
                bare = _bare(part, prefix)
                if len(bare) == 0:
                    left_out["texts without tokens"] += 1
                    continue
                writers["validation" if held_out else "train"].add(bare, text_bytes)
                report(len(bare) + 1, 1)
        report_left_out(left_out + Counter({f"files ({name})": count for name, count in ignored.items()}))
        for writer in writers.values():  # each can still fail, so none is renamed before all are written
            writer.write_all(left_out)
        # Train last: where it exists, the validation text held out from it exists too.
        made = {name: writers[name].commit() for name in reversed(names)}
    return {name: made[name] for name in names}


def _check(settings: PrepareSettings) -> None:
    if not 0 <= settings.validation_share < 1:
        raise ConfigError(f"validation_share = {settings.validation_share} is not in [0, 1)\n  fix: for example 0.01")
    if settings.inner_separators not in (None, *INNER):
        raise ConfigError(
            f"inner_separators = {settings.inner_separators!r} is not known\n  fix: use one of {', '.join(INNER)}"
        )


def _parts(
    text: str, ids: np.ndarray, separator: Separator, tokenizer: Tokenizer, inner: str | None
) -> list[tuple[np.ndarray, int]]:
    """The documents of a text: (tokens without their separator, UTF-8 bytes of their text) of each.

    inner: as PrepareSettings.inner_separators. Raises DataError for a separator inside if that is None.
    """
    places = np.flatnonzero(ids == separator.id)
    if len(places) == 0:
        return [(ids, len(text.encode()))]
    ids = ids[:-1] if places[-1] == len(ids) - 1 else ids
    places = places[places < len(ids)]
    if len(places) and inner is None:
        raise DataError(
            f"a text holds the separator {separator.token} (token {separator.id}) inside, {len(places):,} times; it "
            f"begins with {text[:60]!r}\n"
            "  why: in one document, attention would cross between the texts that it separates\n"
            "  fix: --inner-separators split cuts after each, keep leaves such texts one document (where they "
            "mention the token); --split-on if it is on lines of its own in text files"
        )
    first, *rest = np.split(ids, places) if inner == "split" else [ids]
    parts = [first, *(part[1:] for part in rest)]  # each of the rest begins with a separator
    return [(part, len(tokenizer.decode(part.tolist(), skip_special_tokens=False).encode())) for part in parts]


def _documents(
    files: Sequence[Path], tokenizer_dir: Path, settings: PrepareSettings, left_out: Counter[str]
) -> Iterator[tuple[str, np.ndarray]]:
    texts = read_documents(
        files,
        field=settings.field,
        errors=settings.errors,
        split_on=settings.split_on,
        skip_invalid=settings.skip_invalid,
        left_out=left_out,
    )
    return tokenised(texts, tokenizer_dir, settings.workers or len(os.sched_getaffinity(0)))


def report_left_out(counts: Counter[str]) -> None:
    """Log one line with the number of texts left out, by reason."""
    found = [f"{count:,} {reason}" for reason, count in counts.most_common() if count]
    if found:
        LOGGER.warning("prepare  left out: %s", ", ".join(found))


def _bare(ids: np.ndarray, prefix: list[int]) -> np.ndarray:
    """Remove a prefix that is already in the text, so that no document begins with two."""
    return ids[len(prefix) :] if prefix and ids[: len(prefix)].tolist() == prefix else ids


@functools.lru_cache(maxsize=1)
def _worker_tokenizer(folder: str) -> Tokenizer:
    return load_tokenizer(folder)


def _quiet_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(e.ids, dtype=np.int32) for e in encoded]


def _encode_in_worker(folder: str, texts: list[str]) -> list[np.ndarray]:
    return _encode(_worker_tokenizer(folder), texts)


def _portions(texts: Iterable[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    characters = 0
    for text in texts:
        portion.append(text)
        characters += len(text)
        if len(portion) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield portion
            portion, characters = [], 0
    if portion:
        yield portion


def tokenised(texts: Iterable[str], folder: Path, workers: int) -> Iterator[tuple[str, np.ndarray]]:
    """(text, ids) in the order of `texts`, whatever the number of workers.

    Raises DataError when a worker process dies (most often for want of memory).
    """
    if workers == 1:
        tokenizer = load_tokenizer(folder)
        for portion in _portions(texts):
            yield from zip(portion, _encode(tokenizer, portion), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    waiting: deque[tuple[list[str], Future[list[np.ndarray]]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet_worker) as pool:
        try:
            for portion in _portions(texts):
                waiting.append((portion, pool.submit(_encode_in_worker, str(folder), portion)))
                if len(waiting) >= 4 * workers:
                    first, answer = waiting.popleft()
                    yield from zip(first, answer.result(), strict=True)
            while waiting:
                first, answer = waiting.popleft()
                yield from zip(first, answer.result(), strict=True)
        except BrokenProcessPool as error:
            raise DataError(
                f"a tokenising process was killed: {error}\n  why: most often the machine ran out of memory\n"
                "  fix: use fewer --workers, or split very large documents"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def progress() -> Iterator[Report]:
    """A function that takes numbers of tokens and documents; shows a bar on a terminal, else logs every ten seconds."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    documents = tokens = 0
    last = time.monotonic()
    console = Console()

    def count(new: int, of: int) -> str:
        nonlocal documents, tokens
        documents, tokens = documents + of, tokens + new
        return f"{documents:,} documents, {tokens:,} tokens"

    def line(new: int, of: int) -> None:
        nonlocal last
        text = count(new, of)
        if time.monotonic() - last > REPORT_EVERY_S:
            last = time.monotonic()
            LOGGER.info("prepare  %s", text)

    if not console.is_terminal:
        yield line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading")
        yield lambda new, of: bar.update(task, description=count(new, of))
