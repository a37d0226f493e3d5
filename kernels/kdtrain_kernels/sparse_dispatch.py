"""Which `sparse_stats` and `sparse_grad` run: those of the backend whose dense row kernels would."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from kdtrain_kernels import sparse_rows, torch_rows
from kdtrain_kernels.dispatch import row_kernels


def sparse_kernels(backend: str, device: torch.device) -> ModuleType:
    """The module with sparse_stats and sparse_grad for tensors on `device`. ValueError as from `row_kernels`."""
    if row_kernels(backend, device) is torch_rows:
        return sparse_rows
    return importlib.import_module("kdtrain_kernels.triton.sparse")
