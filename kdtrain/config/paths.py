"""Whether the paths of a configuration are what they should be. Looks at the file system, writes nothing.

Whatever looking at a path can raise (a name that is too long, a loop of links, a folder that may not be entered, text
that is no path) becomes the reason of a problem, so that all problems of a configuration are reported at once.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from kdtrain.config.problems import Problem
from kdtrain.config.schema import RunConfig

ABSENT = "does not exist"
INSIDE_RUN = "/checkpoints/.step_000000000.writing/rank_00000.safetensors"
"""The longest path below a run folder, roughly: it must fit behind the folder's own."""
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes that Linux takes, of one name between slashes and of a whole path."""


def missing_paths(cfg: RunConfig) -> Iterator[Problem]:
    """Stores, model folders and checkpoints that are not there, and an output folder that cannot be written."""
    make = "make one with launch/prepare_corpus.py, or correct the path"
    for path in cfg.data.train:
        yield from _needs("data.train", path, "manifest.json", "a token store", make)
    if cfg.data.validation is not None:
        yield from _needs("data.validation", cfg.data.validation, "manifest.json", "a token store", make)
    fix = "download or import the model first; hub names are not resolved"
    for key, folder in (("student.weights", cfg.student.weights), ("teacher.weights", cfg.teacher.weights)):
        if folder is not None:
            yield from _needs(key, folder, "config.json", "a Hugging Face model folder", fix)
    yield from _architecture(cfg.student.architecture)
    yield from _checkpoints(cfg)
    yield from _output(cfg.run.output_dir, cfg.run.name)


def look(path: Path) -> os.stat_result | str:
    """What is at `path`, links followed; or why that cannot be known, in words that follow it. Raises nothing."""
    try:
        return os.stat(path)
    except OSError as error:
        return _reason(path, error)
    except ValueError:  # a NUL byte, or characters that no file name can hold
        return "holds characters that no path can hold"


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder that can be looked at. Raises nothing."""
    found = look(path)
    return not isinstance(found, str) and stat.S_ISDIR(found.st_mode)


def _reason(path: Path, error: OSError) -> str:
    if error.errno == errno.ENAMETOOLONG:
        return _too_long(path) or "is too long for a path of this file system"
    if error.errno == errno.ELOOP:
        return "leads through symbolic links that go in a circle"
    if error.errno == errno.ENOENT:
        return f"is a symbolic link to {os.readlink(path)}, which {ABSENT}" if path.is_symlink() else ABSENT
    parents = [*reversed(path.parents)]
    if error.errno == errno.ENOTDIR:
        file = next((parent for parent in parents if os.path.exists(parent) and not os.path.isdir(parent)), path.parent)
        return f"{ABSENT}: {file} is not a folder"
    if error.errno == errno.EACCES:
        shut = next((parent for parent in parents if not os.access(parent, os.X_OK)), path.parent)
        return f"cannot be looked at: you have no permission in {shut}"
    return f"cannot be looked at: {error.strerror}"


def _too_long(path: Path) -> str | None:
    longest = max((_bytes(part) for part in path.parts), default=0)
    if longest > LONGEST_NAME:
        return f"holds a name of {longest} bytes, longer than the {LONGEST_NAME} that a file name may have"
    whole = _bytes(str(path))
    return f"has {whole} bytes, more than the {LONGEST_PATH} of a path" if whole > LONGEST_PATH else None


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _checkpoints(cfg: RunConfig) -> Iterator[Problem]:
    """A run that has begun does not need the checkpoint it began from any more."""
    begun = is_folder(_path(cfg.run.output_dir) / _path(cfg.run.name) / "checkpoints")
    resume = "" if cfg.run.resume in ("auto", "never") else cfg.run.resume
    for key, name, fix in (
        ("run.resume", resume, "use auto, never, or the path of a checkpoint"),
        ("run.continue_from", cfg.run.continue_from, "give the path of a checkpoint or of a run folder, or null"),
    ):
        found = look(_path(name)) if name else None
        if isinstance(found, str) and not (found == ABSENT and begun):
            yield Problem(key, name, found, fix)


def _architecture(name: str | None) -> Iterator[Problem]:
    """Known names hold no slash; what is neither a known name nor there is reported when the model is looked at."""
    if not name:
        return
    path = _path(name)
    found = look(path)
    if isinstance(found, str) and (found != ABSENT or "/" in name):
        fix = "give the name of an architecture, or a folder or file with a Hugging Face config.json"
        yield Problem("student.architecture", name, found, fix)
    elif is_folder(path):
        fix = "give the folder that holds config.json, or the file itself"
        yield from _needs("student.architecture", name, "config.json", "a Hugging Face model folder", fix)


def _output(name: str, run: str) -> Iterator[Problem]:
    why, fix = _cannot_hold_runs(name, run), "choose another folder, or change its permissions"
    if why is not None:
        yield Problem("run.output_dir", name, why, fix)


def _cannot_hold_runs(name: str, run: str) -> str | None:
    folder = _path(name)
    if (long := _too_long(folder)) is not None:
        return long
    if (long := _too_long(Path(f"{folder}/{_path(run)}{INSIDE_RUN}"))) is not None:
        return f"cannot hold run folders: what a run writes there {long}"
    while (found := look(folder)) == ABSENT and folder != folder.parent:
        folder = folder.parent
    if isinstance(found, str):
        return found if str(folder) == name else f"cannot hold run folders: {folder} {found}"
    if not stat.S_ISDIR(found.st_mode):
        return f"cannot hold run folders: {folder} is not a folder"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"cannot be written: you have no permission in {folder}"
    return None


def _needs(key: str, name: str, file: str, what: str, fix: str) -> Iterator[Problem]:
    why = _is_not(_path(name), file, what) if name else None  # an empty text is reported elsewhere
    if why is not None:
        yield Problem(key, name, why, fix)


def _is_not(path: Path, file: str, what: str) -> str | None:
    found, inside = look(path), look(path / file)
    if found == ABSENT and not path.is_absolute():
        return f"{ABSENT} (looked in {_working_folder()})"
    if isinstance(found, str):
        return found
    if isinstance(inside, str) and not inside.startswith(ABSENT):
        return f"is not {what}: its {file} {inside}"
    if isinstance(inside, str) or not stat.S_ISREG(inside.st_mode):
        return f"is not {what}: it has no {file}"
    return None if os.access(path / file, os.R_OK) else f"is not readable: you have no permission to read its {file}"


def _working_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # removed while this process is in it
        return "a working folder that has been removed"


def _path(name: str) -> Path:
    """A NUL byte, which no path may hold, is reported elsewhere."""
    return Path(name.replace("\0", ""))
