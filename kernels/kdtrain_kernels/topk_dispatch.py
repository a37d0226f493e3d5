"""Choose the kernels for top-k lists and draws: those of the backend whose dense row kernels would run."""

from __future__ import annotations

import functools
import logging

import torch

from kdtrain_kernels import topk_rows, torch_rows
from kdtrain_kernels.dispatch import row_kernels
from kdtrain_kernels.protocol import TopKKernels

TRITON_MAX_K = 511
"""Longest list and most draws of the triton kernels, which hold the candidates of a row in registers."""


def topk_kernels(backend: str, device: torch.device, work: torch.dtype, k: int) -> TopKKernels:
    """`topk_rows` or `triton.topk`.

    work: the slab's dtype; k: length of the lists. auto falls back to torch where the triton kernels lack a variant
    (float64, k > TRITON_MAX_K). Raises ValueError as `row_kernels` does, and for an explicit triton without such a
    variant.
    """
    if row_kernels(backend, device, work) is torch_rows:
        return topk_rows
    if k <= TRITON_MAX_K:
        from kdtrain_kernels.triton import topk  # needs triton, which torch alone does not

        return topk
    if backend == "auto":
        _log_long_lists(k)
        return topk_rows
    raise ValueError(f"backend = {backend!r} has no top-k kernels for k = {k}, need k <= {TRITON_MAX_K}; choose torch")


@functools.cache
def _log_long_lists(k: int) -> None:
    """Cached, so that it is logged once."""
    logging.getLogger("kdtrain").info("top-k kernels: torch, because k = %d is more than triton's %d", k, TRITON_MAX_K)
