"""Which implementation of the row kernels runs. An explicit choice never falls back to another."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

from kdtrain_kernels import torch_rows

BACKENDS = ("torch", "triton")
"""Names of modules with row_stats, pair_stats, merge_stats, merge_pair_stats, pair_round2, pair_value, pair_grad,
row_grad, pair_measure and first_argmax, of the signatures and meaning of `torch_rows`."""


def row_kernels(backend: str, device: torch.device, work: torch.dtype = torch.float32) -> ModuleType:
    """The row kernels `backend` (auto or one of BACKENDS) names for slabs of dtype `work` on `device`.

    auto takes triton for float32 on CUDA devices where it can be imported, else torch, and logs once why. triton on
    another device runs in triton's interpreter, if TRITON_INTERPRET=1. Raises ValueError for a name that is not there
    and for triton where it cannot run.
    """
    if backend == "auto":
        name, reason = _chosen(device.type, work)
        _log_choice(device.type, name, reason)
        backend = name
    elif backend not in BACKENDS:
        raise ValueError(
            f"backend = {backend!r} is not available for {device.type}; choose auto or {', '.join(BACKENDS)}"
        )
    elif backend == "triton":
        problem = _problem(device.type, work)
        if problem:
            raise ValueError(f"backend = 'triton' is not available for {device.type}: {problem}; choose torch")
    return torch_rows if backend == "torch" else importlib.import_module("kdtrain_kernels.triton.rows")


def choice(device: torch.device) -> tuple[str, str]:
    """(backend, reason): what auto takes for float32 slabs on `device`, and why."""
    return _chosen(device.type, torch.float32)


def _problem(device_type: str, work: torch.dtype) -> str:
    """Why triton cannot run; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a CUDA device, or TRITON_INTERPRET=1 to be interpreted"
    if work != torch.float32:
        return f"it works on float32 logits, not {work}"
    return ""


def _chosen(device_type: str, work: torch.dtype) -> tuple[str, str]:
    """What auto takes, and why."""
    if device_type != "cuda":
        return "torch", "the device is not CUDA"
    problem = _problem(device_type, work)
    if problem:
        return "torch", problem
    try:
        importlib.import_module("kdtrain_kernels.triton.rows")
    except ImportError as error:
        return "torch", f"triton cannot be imported: {error}"
    return "triton", "the device is CUDA"


@functools.cache
def _log_choice(device_type: str, name: str, reason: str) -> None:
    """Cached, so that each choice is logged once."""
    logging.getLogger("kdtrain").info("row kernels on %s: %s, because %s", device_type, name, reason)
