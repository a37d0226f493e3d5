"""Launch where the tensors are, not where the process happens to be."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """The tensor's CUDA device is current inside; nothing happens for tensors on a CPU (the interpreter)."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
