"""Documents from files: plain text and JSON lines, compressed or not. Documents left out are counted by reason."""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import os
import zlib
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from kdtrain.errors import ConfigError, DataError
from kdtrain.log import LOGGER

JSON_SUFFIXES, TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json"), (".txt", ".md", ".rst")
COMPRESSED = (".xz", ".gz")
FOREIGN = (
    ".zst",
    ".zstd",
    ".bz2",
    ".lz4",
    ".lzma",
    ".br",
    ".z",
    ".snappy",
    ".zip",
    ".7z",
    ".rar",
    ".tar",
    ".tgz",
    ".txz",
    ".parquet",
    ".arrow",
    ".feather",
    ".orc",
    ".avro",
    ".pdf",
    ".docx",
    ".bin",
    ".idx",
    ".npy",
    ".npz",
)
"""Suffixes of files that are neither text nor JSON lines."""


def _outer_suffix(path: Path) -> str:
    return path.suffix.lower()


def _inner_suffix(path: Path) -> str:
    """The suffix without that of compression, in lower case."""
    return Path(path.stem).suffix.lower() if _outer_suffix(path) in COMPRESSED else _outer_suffix(path)


def find_files(inputs: Sequence[str | Path], ignored: Counter[str] | None = None) -> list[Path]:
    """Files named by paths, patterns (**, *, ?, []) and folders (searched recursively), in a fixed order, each once.

    A file named by itself or a pattern may have any suffix but those of FOREIGN formats; in a folder only text
    suffixes are read, and other files are logged and counted in `ignored` by suffix. Links to folders are
    followed. Raises ConfigError for what does not exist, cannot be searched, holds no file or cannot be read as text.
    """
    found: dict[Path, Path] = {}
    ignored = Counter() if ignored is None else ignored
    for entry in inputs:
        path, files = Path(entry), []
        names_all_below = not path.exists() and str(entry).endswith(("**", "**/*"))
        matches = [path] if path.exists() else [Path(p) for p in glob.glob(str(entry), recursive=True)]
        for match in matches:
            if match.is_dir():
                files += [] if names_all_below else _in_folder(match, ignored)
            elif match.is_file():
                _refuse_foreign(match)
                files.append(match)
        if not files:
            why = "holds no text file" if any(m.is_dir() for m in matches) else "does not exist"
            raise ConfigError(
                f"{entry} {why}\n  fix: name text files, .jsonl files (either also .xz, .gz), patterns or folders "
                f"(in which {', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)} are looked for)"
            )
        for file in sorted(files):
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _in_folder(folder: Path, all_ignored: Counter[str]) -> list[Path]:
    """Text files in a folder and its subfolders; logs and counts other files by suffix."""
    kept: list[Path] = []
    ignored: Counter[str] = Counter()
    for file in _walk(folder):
        if not file.is_file():
            ignored["broken links and special files"] += 1
        elif _inner_suffix(file) in JSON_SUFFIXES + TEXT_SUFFIXES:
            kept.append(file)
        else:
            ignored[_shown_suffix(file)] += 1
    all_ignored += ignored
    if ignored:
        LOGGER.warning(
            "prepare  %s: %s files are ignored (%s); read are %s, also with %s",
            folder,
            f"{ignored.total():,}",
            ", ".join(f"{count:,} {suffix}" for suffix, count in ignored.most_common()),
            " ".join(TEXT_SUFFIXES + JSON_SUFFIXES),
            " ".join(COMPRESSED),
        )
    return kept


def _shown_suffix(file: Path) -> str:
    inner = _inner_suffix(file)
    both = inner + _outer_suffix(file) if _outer_suffix(file) in COMPRESSED else inner
    return both or "without a suffix"


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder. Each folder is entered once, by its own name rather than by a link."""

    def fail(error: OSError) -> None:
        raise ConfigError(
            f"{error.filename}: cannot be searched: {error.strerror}\n  fix: make it readable, or leave it out"
        ) from error

    entered: set[Path] = set()
    waiting = deque([folder])
    while waiting:
        top = waiting.popleft()
        for place, folders, files in os.walk(top, onerror=fail):
            here = Path(place)
            if here.resolve() in entered:
                folders.clear()  # entered before through a link, or a link to a parent folder
                continue
            entered.add(here.resolve())
            folders.sort()
            waiting.extend(here / name for name in folders if (here / name).is_symlink())
            yield from (here / name for name in files)


def _refuse_foreign(path: Path) -> None:
    """Refuse a file of another format by its suffix; for an unknown suffix, by its first line."""
    inner = _inner_suffix(path)
    if inner in FOREIGN:
        raise ConfigError(
            f"{path}: files of {inner} are not read\n  why: its bytes would be read as text\n"
            f"  fix: turn it into JSON lines or text, compressed with {' or '.join(COMPRESSED)} if need be"
        )
    if inner in JSON_SUFFIXES + TEXT_SUFFIXES:
        return
    try:
        with _open(path) as file:
            record = json.loads(next((line for line in file if line.strip()), b""))
    except (OSError, lzma.LZMAError, zlib.error, EOFError, ValueError, RecursionError):
        return  # not JSON; other faults are reported when the file is read
    if isinstance(record, dict):
        stem, end = (path.stem, path.suffix) if _outer_suffix(path) in COMPRESSED else (path.name, "")
        raise ConfigError(
            f"{path}: begins with a line of JSON, but its suffix is none of {', '.join(JSON_SUFFIXES)}\n"
            "  why: it would become one document, with all its JSON\n"
            f"  fix: rename it to {stem}.jsonl{end}, or to {stem}.txt{end} if it is one text"
        )


def read_documents(
    files: Iterable[Path],
    *,
    field: str = "text",
    errors: str = "strict",
    split_on: str | None = None,
    skip_invalid: bool = False,
    left_out: Counter[str] | None = None,
) -> Iterator[str]:
    """Texts in order: one per line of a JSON-lines file, one per other file. Blank texts are left out.

    errors: "strict", or "replace" to turn invalid UTF-8 into U+FFFD. A byte-order mark at the beginning is dropped.
    split_on: text files hold several documents, between lines that equal it, white space around it aside; "" is a blank
    line. Such files are read line by line. skip_invalid: leave out documents that are invalid UTF-8, no JSON, without a
    text under `field`, or with half a surrogate pair. left_out: counts of documents left out, by reason; blank lines of
    JSON lines, empty parts at the ends of a file and between blank lines are not documents and are not counted. Raises
    DataError naming file and place: invalid UTF-8, malformed JSON, a missing field, a damaged archive.
    """
    counts: Counter[str] = Counter() if left_out is None else left_out
    for path in files:
        is_json = _inner_suffix(path) in JSON_SUFFIXES
        kind = "texts" if is_json else "parts" if split_on is not None else "files"
        try:
            with _open(path) as file:
                if is_json:
                    texts = _json_lines(path, file, field, errors)
                elif split_on is not None:
                    texts = _parts(path, file, split_on.strip(), errors)
                else:
                    texts = iter([_text_or_error(path, file.read(), 0, errors)])
                if not (yield from _kept(texts, kind, skip_invalid, counts)):
                    counts["files of only white space" if file.tell() else "empty files"] += 1
        except (OSError, lzma.LZMAError, zlib.error, EOFError) as error:
            raise DataError(f"{path}: cannot be read: {error}\n  fix: copy the file again") from error


class InvalidDocument(DataError):
    """A document that cannot be read. reason: what --skip-invalid counts it under, in the plural."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _kept(
    texts: Iterator[str | InvalidDocument], kind: str, skip_invalid: bool, counts: Counter[str]
) -> Generator[str, None, bool]:
    """Texts with more than white space; others are counted, or raised. Returns whether there was any text."""
    found = False
    for text in texts:
        found = True
        if isinstance(text, InvalidDocument):
            if not skip_invalid:
                raise text
            counts[text.reason] += 1
        elif text.strip():
            yield text
        else:
            counts[f"{kind} of only white space" if text else f"empty {kind}"] += 1
    return found


def _open(path: Path) -> IO[bytes]:
    if _outer_suffix(path) == ".xz":
        return lzma.open(path, "rb")
    return gzip.open(path, "rb") if _outer_suffix(path) == ".gz" else path.open("rb")  # type: ignore[return-value]


def _decode(path: Path, data: bytes, offset: int, errors: str) -> str:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8", errors=errors)
    except UnicodeDecodeError as error:
        # error.object excludes the byte-order mark
        place = offset + len(data) - len(error.object) + error.start
        raise InvalidDocument(
            "documents of invalid UTF-8",
            f"{path}: invalid UTF-8 at byte {place} ({error.object[error.start : error.start + 4].hex(' ')})\n"
            "  why: the model would learn replacement characters\n"
            "  fix: convert the file (iconv -t UTF-8), accept replacement characters with --errors replace, or leave "
            "such documents out with --skip-invalid",
        ) from error


def _text_or_error(path: Path, data: bytes, offset: int, errors: str) -> str | InvalidDocument:
    try:
        return _decode(path, data, offset, errors)
    except InvalidDocument as error:
        return error


def _parts(path: Path, file: IO[bytes], marker: str, errors: str) -> Iterator[str | InvalidDocument]:
    """Documents between marker lines; one with an invalid line is invalid as a whole. Yields no empty part that is
    first or last, or between blank lines: those are not documents."""
    offset = 0
    part: list[str] = []
    invalid: InvalidDocument | None = None
    begun = False
    for line in file:
        text = _text_or_error(path, line, offset, errors)
        offset += len(line)
        if isinstance(text, InvalidDocument):
            invalid = invalid or text
        elif text.strip() == marker:
            if invalid or part or (begun and marker):
                yield invalid or "".join(part)
            part, invalid, begun = [], None, True
        else:
            part.append(text)
    if invalid or part:
        yield invalid or "".join(part)


def _json_lines(path: Path, file: IO[bytes], field: str, errors: str) -> Iterator[str | InvalidDocument]:
    offset = 0
    for number, line in enumerate(file, start=1):
        text = _text_or_error(path, line, offset, errors)
        offset += len(line)
        if isinstance(text, InvalidDocument):
            yield text
        elif text.strip():
            yield _json_text(f"{path}:{number}", text, field, errors)


def _json_text(where: str, line: str, field: str, errors: str) -> str | InvalidDocument:
    """The text of one line of JSON."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # numbers of over 4300 digits are a plain ValueError
        return InvalidDocument(
            "lines of invalid JSON",
            f"{where}: not valid JSON: {error}\n"
            "  fix: write one JSON object per line, or leave such lines out with --skip-invalid",
        )
    if not isinstance(record, dict) or field not in record:
        keys = sorted(record) if isinstance(record, dict) else f"{line.strip()[:60]}, which is not an object"
        return InvalidDocument(
            f"lines without {field!r}",
            f"{where}: no text under {field!r} (found {keys})\n"
            "  fix: name it with --field, or leave such lines out with --skip-invalid",
        )
    value = record[field]
    if not isinstance(value, str):
        kind = _json_type(value)
        shown = kind if isinstance(value, list | dict) else json.dumps(value)
        return InvalidDocument(
            f"lines whose {field!r} is {kind}",
            f"{where}: no text under {field!r}: its value is {shown if len(shown) <= 60 else shown[:60] + '...'}\n"
            "  fix: name another field with --field, or leave such lines out with --skip-invalid",
        )
    return _without_surrogates(where, value, errors)


def _json_type(value: object) -> str:
    """Name of a JSON type."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return kinds[type(value)]


def _without_surrogates(where: str, text: str, errors: str) -> str | InvalidDocument:
    r"""Check for half a surrogate pair, which JSON can contain ("\ud83d") and no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return InvalidDocument(
            "texts with half a surrogate pair",
            f"{where}: character {error.start} is half a surrogate pair\n"
            "  fix: repair the escape in the file, accept replacement characters with --errors replace, or leave such "
            "lines out with --skip-invalid",
        )
    return text
