"""Documents out of files: plain text and JSON lines, compressed or not. Nothing is guessed, nothing is dropped."""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from kdtrain.errors import ConfigError, DataError

JSON_SUFFIXES, TEXT_SUFFIXES = (".jsonl", ".json"), (".txt", ".md", ".rst")
COMPRESSED = (".xz", ".gz")


def _inner_suffix(path: Path) -> str:
    """The suffix that says what the file holds once it is decompressed."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Files named by paths, patterns (**, *, ?, []) and folders (searched recursively), in a fixed order, each once.

    A file named by itself may have any suffix, in a folder only those known to hold text count. Raises ConfigError
    for what does not exist or holds no file.
    """
    found: dict[Path, Path] = {}
    for entry in inputs:
        path = Path(entry)
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.is_file() and _inner_suffix(p) in JSON_SUFFIXES + TEXT_SUFFIXES]
        else:
            files = [path] if path.is_file() else [Path(p) for p in glob.glob(str(entry), recursive=True)]
        files = [p for p in files if p.is_file()]
        if not files:
            why = "holds no text file" if path.is_dir() else "does not exist"
            raise ConfigError(
                f"{entry} {why}\n  fix: name text files, .jsonl files (either also .xz, .gz), patterns or folders "
                f"(in which {', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)} are looked for)"
            )
        for file in sorted(files):
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read_documents(
    files: Iterable[Path], *, field: str = "text", errors: str = "strict", split_on: str | None = None
) -> Iterator[str]:
    """Texts in order: one per line of a JSON-lines file, one per other file. Blank texts are left out.

    errors: "strict", or "replace" to turn invalid UTF-8 into U+FFFD. A byte-order mark at the beginning is dropped.
    split_on: text files hold several documents, between lines that equal it, white space around it aside; "" is a
    blank line. Such files are read line by line.
    Raises DataError naming file and place: invalid UTF-8, malformed JSON, a missing field, a damaged archive.
    """
    for path in files:
        try:
            with _open(path) as file:
                if _inner_suffix(path) in JSON_SUFFIXES:
                    texts = _json_lines(path, file, field, errors)
                elif split_on is not None:
                    texts = _parts(path, file, split_on.strip(), errors)
                else:
                    texts = iter([_decode(path, file.read(), 0, errors)])
                yield from (text for text in texts if text.strip())
        except (OSError, lzma.LZMAError, zlib.error, EOFError) as error:
            raise DataError(f"{path}: cannot be read: {error}\n  fix: copy the file again") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _decode(path: Path, data: bytes, offset: int, errors: str) -> str:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8", errors=errors)
    except UnicodeDecodeError as error:
        # error.object is what was left after a byte-order mark
        place = offset + len(data) - len(error.object) + error.start
        raise DataError(
            f"{path}: invalid UTF-8 at byte {place} ({error.object[error.start : error.start + 4].hex(' ')})\n"
            "  why: silently replaced characters would be learned\n"
            "  fix: convert the file (iconv -t UTF-8), or accept replacement characters with --errors replace"
        ) from error


def _parts(path: Path, file: IO[bytes], marker: str, errors: str) -> Iterator[str]:
    offset = 0
    part: list[str] = []
    for line in file:
        text = _decode(path, line, offset, errors)
        offset += len(line)
        if text.strip() == marker:
            yield "".join(part)
            part = []
        else:
            part.append(text)
    yield "".join(part)


def _json_lines(path: Path, file: IO[bytes], field: str, errors: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(file, start=1):
        text = _decode(path, line, offset, errors)
        offset += len(line)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:  # numbers of over 4300 digits are a plain ValueError
            raise DataError(
                f"{path}:{number}: not valid JSON: {error}\n  fix: write one JSON object per line"
            ) from error
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, str):
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{path}:{number}: no text under {field!r} (found {keys})\n  fix: name it with --field")
        yield _without_surrogates(f"{path}:{number}", value, errors)


def _without_surrogates(where: str, text: str, errors: str) -> str:
    r"""JSON can spell half a character ("\ud83d"); no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise DataError(
            f"{where}: character {error.start} is half a surrogate pair\n"
            "  fix: repair the escape in the file, or accept replacement characters with --errors replace"
        ) from error
    return text
