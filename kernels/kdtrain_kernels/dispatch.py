"""Which implementation of the row kernels runs. An explicit choice never falls back to another."""

from __future__ import annotations

from types import ModuleType

import torch

from kdtrain_kernels import torch_rows

BACKENDS: dict[str, ModuleType] = {"torch": torch_rows}
"""Name -> module with row_stats, pair_stats, merge_stats, merge_pair_stats, pair_round2, pair_value, pair_grad,
row_grad, pair_measure and first_argmax, of the signatures and meaning of `torch_rows`."""


def row_kernels(backend: str, device: torch.device) -> ModuleType:
    """The row kernels `backend` (auto or a key of BACKENDS) names for tensors on `device`.

    auto takes torch, which runs on every device. Raises ValueError for a name that is not there.
    """
    name = "torch" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(
            f"backend = {backend!r} is not available for {device.type}; choose auto or {', '.join(BACKENDS)}"
        )
    return BACKENDS[name]
