"""Which kernels select and draw: those of the backend whose dense row kernels would run."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from kdtrain_kernels import topk_rows, torch_rows
from kdtrain_kernels.dispatch import row_kernels

TRITON_MAX_K = 511
"""Longest list that the triton kernels select: they hold the candidates of a row in registers."""


def topk_kernels(backend: str, device: torch.device, work: torch.dtype, k: int) -> ModuleType:
    """The module with topk_select, topk_merge, restore, tail_cdf and tail_sample, as `topk_rows` has them.

    work: the slab's dtype; k: length of the lists. auto takes torch where the triton kernels have no form (float64,
    k > TRITON_MAX_K). Raises ValueError as `row_kernels` does, and for an explicit triton that has no such form.
    """
    if row_kernels(backend, device) is torch_rows:
        return topk_rows
    if work == torch.float32 and k <= TRITON_MAX_K:
        return importlib.import_module("kdtrain_kernels.triton.topk")
    if backend == "auto":
        return topk_rows
    raise ValueError(
        f"backend = {backend!r} has no top-k kernels for {work} logits and k = {k}, need float32 and "
        f"k <= {TRITON_MAX_K}; choose torch"
    )
