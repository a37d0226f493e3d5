"""Versions, git state and devices of a run, for environment.json and the first line of the console."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

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
    "flash-attn-3",
    "flash-attn-4",
    "wandb",
)
TF32_VARIABLES = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")
"""Variables by which containers and job scripts enable or disable TF32 in float32 products."""


def environment_record(*, world_size: int = 1) -> dict[str, Any]:
    """Versions, git commit, devices, host, command and time, as plain values for JSON.

    Of this rank's host only. Environment variables other than those of `settings` are left out, as they may hold
    secrets. Does not communicate.
    """
    return {
        "kdtrain": kdtrain.__version__,
        "git": git_state(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "cuda": torch.version.cuda,
        "nccl": nccl_version(),
        "settings": settings(os.environ),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "world_size": world_size,
        "command": sys.argv,
        "folder": str(Path.cwd()),
    }


def nccl_version() -> str | None:
    """Version of the NCCL that torch loads; None without a CUDA device."""
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environ` that change NCCL, TF32 or the number of threads, by name."""
    named = (*TF32_VARIABLES, "OMP_NUM_THREADS")
    chosen = (name for name in environ if name.startswith(("NCCL_", "TORCH_NCCL_")) or name in named)
    return {name: environ[name] for name in sorted(chosen)}


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
