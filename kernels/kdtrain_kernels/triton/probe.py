"""Test whether triton works on a device: one row, launched and read back."""

from __future__ import annotations

import torch
from triton.errors import TritonError

from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.triton.rows import ROW_MULTIPLE, first_argmax

EXPECTED = [[1.0, 77.0]]


def launch(device: torch.device) -> None:
    """Find a row's largest logit on the device's current stream and wait for the result.

    Raises RuntimeError if the result is wrong or triton cannot compile or load the kernel; also errors of torch, the
    driver or a compiler.
    """
    slab = torch.zeros(1, ROW_MULTIPLE, device=device)
    slab[0, 77] = 1.0
    try:
        answer = first_argmax(slab, Scratch.of(slab)).tolist()
    except TritonError as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    if answer != EXPECTED:
        raise RuntimeError(f"the maximum of a row and its column came out as {answer}, not {EXPECTED}")
