"""Kernel launches: the device they run on, and their compile options."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in triton's interpreter; as for @triton.jit, fixed at import."""


def compile_options(warps: int) -> dict[str, Any]:
    """Compile options of every kernel, set explicitly so that they do not depend on a release's or an environment's
    default.

    No fusion of products and sums: equal inputs then give equal bits in every kernel, as required for exact zeros with
    equal models and with kd_weight 0. No pipelining: rows are overwritten while they are read.
    """
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}


def launch(kernel: Any, on: Tensor, programs: int, *arguments: Any, warps: int, **constants: Any) -> None:
    """`programs` programs of `kernel` on the device and the current stream of `on`; none if `programs` is 0."""
    if programs:
        with on_device_of(on):
            kernel[(programs,)](*arguments, **constants, **compile_options(warps))


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """The tensor's CUDA device is current inside; nothing happens for tensors on a CPU (the interpreter)."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def rounding(slab: Tensor, operand: Tensor, block: int, warps: int) -> dict[str, Any]:
    """The constexpr arguments of a kernel that stores `operand` over `slab`: see `rounding_on`."""
    backend = "" if INTERPRETED else backend_of(slab)
    return rounding_on(backend, operand.element_size() < slab.element_size(), block, warps)


def rounding_on(backend: str, narrow: bool, block: int, warps: int) -> dict[str, Any]:
    """NARROW: whether elements are stored over wider ones. BACKEND, PER_THREAD: how `barrier.after_all` waits then."""
    return {"NARROW": narrow, "BACKEND": backend, "PER_THREAD": block // (32 * warps)}


def backend_of(tensor: Tensor) -> str:
    """triton's name of what compiles for the tensor's device: cuda, or hip where torch is built for AMD."""
    if not tensor.is_cuda:
        return ""
    return "cuda" if torch.version.hip is None else "hip"
