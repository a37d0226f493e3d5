"""Whether the paths of a configuration are what they should be. Looks at the file system, writes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kdtrain.config.problems import Problem
from kdtrain.config.schema import RunConfig


def missing_paths(cfg: RunConfig) -> Iterator[Problem]:
    """Stores, model folders and checkpoints that are not there, and an output folder that cannot be written."""
    make = "make one with launch/prepare_corpus.py, or correct the path"
    for path in cfg.data.train:
        yield from _needs("data.train", path, "manifest.json", "a token store", make)
    if cfg.data.validation is not None:
        yield from _needs("data.validation", cfg.data.validation, "manifest.json", "a token store", make)
    for key, folder in (("student.weights", cfg.student.weights), ("teacher.weights", cfg.teacher.weights)):
        if folder is not None:
            fix = "download or import the model first; hub names are not resolved"
            yield from _needs(key, folder, "config.json", "a Hugging Face model folder", fix)
    # A run that has begun needs the checkpoint it began from no more.
    begun = (_path(cfg.run.output_dir) / _path(cfg.run.name) / "checkpoints").is_dir()
    if cfg.run.resume not in ("auto", "never", "") and not begun and not _path(cfg.run.resume).exists():
        yield Problem("run.resume", cfg.run.resume, "does not exist", "use auto, never, or the path of a checkpoint")
    yield from _output(cfg.run.output_dir)


def _output(name: str) -> Iterator[Problem]:
    folder = _path(name).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        yield Problem(
            "run.output_dir", name, f"cannot hold run folders: {folder} is not a folder", "choose another path"
        )
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield Problem(
            "run.output_dir", name, f"cannot be written: you have no permission in {folder}",
            "choose another folder, or change its permissions",
        )  # fmt: skip


def _needs(key: str, name: str, file: str, what: str, fix: str) -> Iterator[Problem]:
    path = _path(name)
    if not name:
        return  # reported as empty already
    if not path.exists():
        yield Problem(key, name, f"does not exist (looked in {Path.cwd()})" if not path.is_absolute() else
                      "does not exist", fix)  # fmt: skip
    elif not (path / file).is_file():
        yield Problem(key, name, f"is not {what}: it has no {file}", fix)


def _path(name: str) -> Path:
    """A NUL byte, which no path may hold, is reported elsewhere."""
    return Path(name.replace("\0", ""))
