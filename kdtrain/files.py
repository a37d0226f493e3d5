"""Files that are flushed to disk when a call returns, and replaced atomically."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""All file names of a Hugging Face tokenizer; other files in its folder, such as weights, are not copied with it."""


def sync(path: Path) -> None:
    """Flush a file or a folder (the names in it) to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write `data` and flush it to disk. Raises OSError; the file may then be incomplete."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that readers see the old content or the new, never a part, also after a kill at any moment."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, text.encode())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def is_running(pid: int) -> bool:
    """Whether a process with this id runs on this machine, of any user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process; or too large for a process id, assumed running
        return True
    return True
