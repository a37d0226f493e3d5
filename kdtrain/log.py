"""The logger of the project: rank 0 logs to the console, every rank to a file once a run folder exists."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

LOGGER = logging.getLogger("kdtrain")


class _Colours(logging.Formatter):
    """Plain text for files and pipes; on a terminal the first word is cyan, warnings are yellow, errors red."""

    def __init__(self, enabled: bool) -> None:
        super().__init__("%(message)s")
        self._enabled = enabled

    def format(self, record: logging.LogRecord) -> str:
        """The message, coloured if enabled."""
        text = super().format(record)
        if not self._enabled:
            return text
        if record.levelno >= logging.WARNING:
            return f"\x1b[{31 if record.levelno >= logging.ERROR else 33}m{text}\x1b[0m"
        word, space, rest = text.partition(" ")
        return f"\x1b[36m{word}\x1b[0m{space}{rest}"


class _LogFile(logging.FileHandler):
    """A log file that keeps a write error in `failure`, for the trainer to end the run, and prints no traceback."""

    failure: OSError | None = None

    def handleError(self, record: logging.LogRecord) -> None:
        """Keep an OSError for `log_failure`; print any other error, which is a mistake in the logging call."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self.failure = error
        else:
            super().handleError(record)


def log_failure() -> tuple[str, OSError] | None:
    """This rank's log file and the error that left it incomplete; None if it is complete."""
    for handler in LOGGER.handlers:
        if isinstance(handler, _LogFile) and handler.failure is not None:
            return handler.baseFilename, handler.failure
    return None


def wants_colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal and neither NO_COLOR nor TERM=dumb is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def rank_from_environment() -> int:
    """The global rank that a launcher set, 0 without one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def setup_logging(rank: int | None = None, folder: Path | None = None) -> logging.Logger:
    """Configure the project's logger: rank 0 to stdout; with `folder`, console.log (rank 0) or ranks/rank_N.log.

    Safe to call again once the run folder is known.
    """
    rank = rank_from_environment() if rank is None else rank
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(_Colours(wants_colour(sys.stdout)))
        LOGGER.addHandler(console)
    if folder is not None:
        path = folder / "console.log" if rank == 0 else folder / "ranks" / f"rank_{rank:04d}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _LogFile(path, encoding="utf-8", delay=rank != 0)
        file.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        file.setFormatter(logging.Formatter("%(message)s" if rank == 0 else "%(asctime)s %(levelname)s %(message)s"))
        LOGGER.addHandler(file)
    if not LOGGER.handlers:
        LOGGER.addHandler(logging.NullHandler())
    return LOGGER
