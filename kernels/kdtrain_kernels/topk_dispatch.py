"""Choose the kernels for top-k lists and draws: those of the backend whose dense row kernels would run."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

import torch

from kdtrain_kernels import topk_rows, torch_rows
from kdtrain_kernels.dispatch import row_kernels

TRITON_MAX_K = 511
"""Longest list and most draws of the triton kernels, which hold the candidates of a row in registers."""


def topk_kernels(backend: str, device: torch.device, work: torch.dtype, k: int) -> ModuleType:
    """The module with topk_select, topk_merge, restore, tail_cdf and tail_sample, as `topk_rows` has them.

    work: the slab's dtype; k: length of the lists. auto falls back to torch where the triton kernels lack a variant
    (float64, k > TRITON_MAX_K). Raises ValueError as `row_kernels` does, and for an explicit triton without such a
    variant.
    """
    if row_kernels(backend, device, work) is torch_rows:
        return topk_rows
    if k <= TRITON_MAX_K:
        return importlib.import_module("kdtrain_kernels.triton.topk")
    if backend == "auto":
        _log_long_lists(k)
        return topk_rows
    raise ValueError(f"backend = {backend!r} has no top-k kernels for k = {k}, need k <= {TRITON_MAX_K}; choose torch")


@functools.cache
def _log_long_lists(k: int) -> None:
    """Cached, so that it is logged once."""
    logging.getLogger("kdtrain").info("top-k kernels: torch, because k = %d is more than triton's %d", k, TRITON_MAX_K)
