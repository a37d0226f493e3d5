"""A copy of this repository, to change and run in a test, and which files of it were changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.support.launching import ROOT

NOT_COUNTED = ("tests", "configs", "docs")
"""Folders whose changes `changed_files` leaves out."""
BUILD_PRODUCTS = {".venv", ".quickstart", ".newest", ".pytest_cache", ".mypy_cache", ".ruff_cache", "runs", "build"}


def tracked_files() -> list[Path]:
    """Tracked files of a checkout; outside one (an image, an archive), every file that is not a build product."""
    if shutil.which("git"):
        git = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
        if git.returncode == 0:
            return [ROOT / name for name in git.stdout.split("\0") if name and (ROOT / name).is_file()]
    return [ROOT / name for name in _files(ROOT)]


def copy_tree(to: Path) -> Path:
    """Copy every tracked file, as it is in the working tree, to the folder `to`; returns `to`."""
    for path in tracked_files():
        target = to / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return to


def changed_files(tree: Path) -> list[str]:
    """Files of a copy that are new, changed or removed, sorted; those of tests, configs and docs are left out."""
    before = {path.relative_to(ROOT).as_posix(): path for path in tracked_files()}
    after = {name: tree / name for name in _files(tree)}
    names = {name for name in before.keys() | after.keys() if name.partition("/")[0] not in NOT_COUNTED}
    kept = before.keys() & after.keys()
    return sorted(name for name in names if name not in kept or before[name].read_bytes() != after[name].read_bytes())


def tree_environment(tree: Path) -> dict[str, str]:
    """Variables with which a new process imports kdtrain and its kernels from `tree`."""
    return {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}"}


def _files(folder: Path) -> list[str]:
    """Every file below `folder` that is not a build product, by its path relative to it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kept = (path for path in paths if path.parts[0] not in BUILD_PRODUCTS and "__pycache__" not in path.parts)
    return [path.as_posix() for path in kept]
