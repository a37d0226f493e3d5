"""Give a finished folder its name, in one step or in place of a former one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdtrain.files import is_running, sync, write_synced
from kdtrain.log import LOGGER


def write_manifest(folder: Path, name: str, content: bytes) -> None:
    """Write the manifest `name` into `folder` and flush it and the folder's list of files to disk. Raises OSError.

    Call it last, when all other files are on disk: a reader takes a folder that has its manifest for complete.
    """
    write_synced(folder / name, content)
    sync(folder)


def publish(unfinished: Path, folder: Path, retired: Path | None = None) -> None:
    """Rename `unfinished` to `folder` and flush the new name to disk. Raises OSError.

    Without `retired` there must be no `folder`. With it, a former `folder` is renamed to `retired` first and left to
    the caller to remove; a former `retired` is removed. A kill between the two renames leaves no `folder`, so the name
    `retired` must be one from which the caller's readers recover.
    """
    if retired is not None and folder.exists():
        if retired.exists():
            shutil.rmtree(retired)
        os.rename(folder, retired)
    os.rename(unfinished, folder)
    sync(folder.parent)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder beside `folder` that replaces it when the block ends; if the block raises, it is removed.

    Every file is flushed to disk before the rename, so that a crash leaves the old folder or the new one. After a kill
    between the two renames the old one has a hidden name, from which the next call, or `recover_folder`, restores it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    unfinished = folder.with_name(f".{folder.name}.writing.{os.getpid()}")
    retired = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        for path in (*unfinished.rglob("*"), unfinished):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes files that only their owner can read
            sync(path)
        publish(unfinished, folder, retired)
    finally:
        if retired.exists() and not folder.exists():
            os.rename(retired, folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Undo an interrupted `replacing_folder`: the old folder gets its name back, unfinished ones are removed.

    Only one process may be replacing `folder`. Folders of processes that run on this machine are not touched.
    """
    retired = [path for path in _leftovers(folder, "old") if not _is_in_use(path)]
    if retired and not folder.exists():
        newest = max(retired, key=lambda path: path.stat().st_mtime)
        LOGGER.warning("%s is restored: a process was killed while it replaced it", folder)
        os.rename(newest, folder)
        retired.remove(newest)
    for path in (*retired, *(path for path in _leftovers(folder, "writing") if not _is_in_use(path))):
        shutil.rmtree(path, ignore_errors=True)


def _leftovers(folder: Path, kind: str) -> list[Path]:
    prefix = f".{folder.name}.{kind}."
    found = folder.parent.iterdir() if folder.parent.is_dir() else ()
    return [path for path in found if path.name.startswith(prefix) and path.name.removeprefix(prefix).isdigit()]


def _is_in_use(leftover: Path) -> bool:
    """Whether another process with the id at the end of the name runs here; this process has not begun yet."""
    pid = int(leftover.name.rpartition(".")[2])
    return pid != os.getpid() and is_running(pid)
