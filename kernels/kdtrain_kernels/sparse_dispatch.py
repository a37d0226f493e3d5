"""Choose `sparse_stats` and `sparse_grad`: those of the backend whose dense row kernels would run."""

from __future__ import annotations

import torch

from kdtrain_kernels import sparse_rows, torch_rows
from kdtrain_kernels.dispatch import row_kernels
from kdtrain_kernels.protocol import SparseKernels


def sparse_kernels(backend: str, device: torch.device, work: torch.dtype) -> SparseKernels:
    """`sparse_rows` or `triton.sparse`. work: the slab's dtype.

    auto falls back to torch where the triton kernels lack a variant (float64). Raises ValueError as `row_kernels` does,
    and for an explicit triton without such a variant.
    """
    if row_kernels(backend, device, work) is torch_rows:
        return sparse_rows
    from kdtrain_kernels.triton import sparse  # needs triton, which torch alone does not

    return sparse
