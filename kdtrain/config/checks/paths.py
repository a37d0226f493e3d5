"""Checks of the settings that are paths: whether the right files and folders are there. Writes nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kdtrain.config.checks.report import Report
from kdtrain.config.paths import ABSENT, is_folder, look, too_long
from kdtrain.config.schema import RunConfig

INSIDE_RUN = "/checkpoints/.step_000000000.writing/rank_00000.safetensors"
"""The longest path below a run folder, roughly: it must fit behind the folder's own."""


def check_paths(cfg: RunConfig, report: Report) -> None:
    """Stores, model folders and checkpoints that are not there, and an output folder that cannot be written."""
    make = "make one with launch/prepare_corpus.py, or correct the path"
    for path in cfg.data.train:
        _needs("data.train", path, "manifest.json", "a token store", make, report)
    if cfg.data.validation is not None:
        _needs("data.validation", cfg.data.validation, "manifest.json", "a token store", make, report)
    fix = "download or import the model first; hub names are not resolved"
    for key, folder in (("student.weights", cfg.student.weights), ("teacher.weights", cfg.teacher.weights)):
        if folder is not None:
            _needs(key, folder, "config.json", "a Hugging Face model folder", fix, report)
    _architecture(cfg.student.architecture, report)
    _checkpoints(cfg, report)
    why = _cannot_hold_runs(cfg.run.output_dir, cfg.run.name)
    if why is not None:
        report.add("run.output_dir", why, "choose another folder, or change its permissions")


def _checkpoints(cfg: RunConfig, report: Report) -> None:
    """A run that has begun no longer needs the checkpoint it began from."""
    begun = is_folder(_path(cfg.run.output_dir) / _path(cfg.run.name) / "checkpoints")
    resume = "" if cfg.run.resume in ("auto", "never") else cfg.run.resume
    for key, name, fix in (
        ("run.resume", resume, "use auto, never, or the path of a checkpoint"),
        ("run.continue_from", cfg.run.continue_from, "give the path of a checkpoint or of a run folder, or null"),
    ):
        found = look(_path(name)) if name else None
        if isinstance(found, str) and not (found == ABSENT and begun):
            report.add(key, found, fix)


def _architecture(name: str | None, report: Report) -> None:
    """Known names hold no slash. Any other name without a slash is checked when the model is read."""
    if not name:
        return
    path = _path(name)
    found = look(path)
    if isinstance(found, str) and (found != ABSENT or "/" in name):
        fix = "give the name of an architecture, or a folder or file with a Hugging Face config.json"
        report.add("student.architecture", found, fix)
    elif is_folder(path):
        fix = "give the folder that holds config.json, or the file itself"
        _needs("student.architecture", name, "config.json", "a Hugging Face model folder", fix, report)


def _cannot_hold_runs(name: str, run: str) -> str | None:
    folder = _path(name)
    if (long := too_long(folder)) is not None:
        return long
    if (long := too_long(Path(f"{folder}/{_path(run)}{INSIDE_RUN}"))) is not None:
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


def _needs(key: str, name: str, file: str, what: str, fix: str, report: Report) -> None:
    why = _is_not(_path(name), file, what) if name else None  # an empty string is reported by check_texts
    if why is not None:
        report.add(key, why, fix, value=name)


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
    """The path without NUL bytes, which no path may hold and which check_texts reports."""
    return Path(name.replace("\0", ""))
