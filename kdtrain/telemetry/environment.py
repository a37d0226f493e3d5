"""Where a run ran: versions, source state and devices, for environment.json and the first line of the console."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kdtrain

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "omegaconf",
    "numpy",
    "safetensors",
    "triton",
    "flash-attn",
    "wandb",
)


def describe(*, world_size: int = 1) -> dict[str, Any]:
    """Versions, git commit, devices, host, command and time, as plain values for JSON.

    Describes this rank's host only. Holds no environment variables: they may carry secrets. Does not communicate.
    """
    return {
        "kdtrain": kdtrain.__version__,
        "git": git_state(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "world_size": world_size,
        "command": sys.argv,
        "folder": str(Path.cwd()),
    }


def headline(found: dict[str, Any]) -> str:
    """The first line of a run: `kdtrain 0.1.0 (3f2c1ab, clean)  torch 2.13.0  deepspeed 0.19.8`."""
    git = found["git"]
    state = "no git" if git is None else f"{git['commit'][:7]}, {'modified' if git['dirty'] else 'clean'}"
    versions = [f"{name} {found['packages'][name]}" for name in ("torch", "deepspeed") if name in found["packages"]]
    return "  ".join([f"kdtrain {found['kdtrain']} ({state})", *versions])


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None outside a checkout or without git."""
    if shutil.which("git") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": changes is None or changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
