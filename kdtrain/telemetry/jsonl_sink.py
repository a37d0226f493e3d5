"""metrics.jsonl: one JSON object per report, with the same keys as wandb."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from kdtrain.errors import ConfigError, DataError, OutputError
from kdtrain.files import write_atomic
from kdtrain.log import LOGGER

STEP = "data/step"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every complete record of the file, oldest first; [] without the file.

    A last line that is incomplete because its writer was killed is left out. Raises DataError for another damaged line.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()  # empty after a complete record
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:  # not JSON or not UTF-8
            raise DataError(
                f"{path}:{number} is not a JSON record: {error}\n  fix: move the file away; the run starts a new one"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get(STEP), int):
            raise DataError(f"{path}:{number} is a record without {STEP}\n  fix: move the file away")
        records.append(record)
    if torn:
        LOGGER.warning("%s ends in the middle of a record (the writer was killed); it is left out", path)
    return records


class JsonlSink:
    """Appends records; each has been flushed to the operating system when `write` returns."""

    def __init__(self, path: Path, *, resume_step: int = 0, lazy: bool = False) -> None:
        """Continue the file at `path` after optimizer step `resume_step`; 0: of a run from scratch.

        Records past that step are removed (by an atomic rewrite), as the resumed run repeats them: the file holds each
        step once. A run from scratch renames an existing file to metrics.jsonl.before. lazy: create no file before the
        first record. Raises ConfigError if the file cannot be written.
        """
        self.path = path
        found = read_records(path)
        kept = [record for record in found if resume_step and record[STEP] <= resume_step]
        try:
            if found and not resume_step:
                os.replace(path, path.with_name(path.name + ".before"))
            if kept or path.exists() or not lazy:
                write_atomic(path, "".join(map(_line, kept)))
            self._file: TextIO | None = None if lazy else path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}\n  why: every report of the run goes there\n"
                "  fix: choose another run.output_dir, or make room and permissions there"
            ) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, which must hold data/step, an int, and flush it. Numbers that are not finite become null.

        Raises OutputError if writing fails.
        """
        if not isinstance(record.get(STEP), int):
            raise ValueError(f"a record needs an int {STEP}, got {record.get('step')!r}")
        line = _line(record)
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise OutputError.of(self.path, error) from error

    def close(self, *, failed: bool = False) -> None:
        """Sync the file to disk and close it. failed: the run ends with an error; else raises OutputError."""
        if self._file is None or self._file.closed:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            if not failed:  # a failed run has reported its first error
                raise OutputError.of(self.path, error) from error
        finally:
            with contextlib.suppress(OSError):  # flushed above, or failed there
                self._file.close()


def _line(record: Mapping[str, Any]) -> str:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean, allow_nan=False) + "\n"
