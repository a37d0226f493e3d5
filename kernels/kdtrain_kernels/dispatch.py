"""Which implementation of the row kernels runs. An explicit choice never falls back to another."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import subprocess
from collections.abc import Callable

import torch

from kdtrain_kernels import torch_rows
from kdtrain_kernels.divergences import DIVERGENCES, DivergenceSpec
from kdtrain_kernels.protocol import RowKernels

BACKENDS = ("torch", "triton")
"""Names of the implementations of `RowKernels`: `torch_rows` and `triton.rows`."""

TRITON_DIVERGENCES: dict[str, tuple[str, ...]] = {
    "forward_kl": (),
    "reverse_kl": (),
    "jsd": ("teacher_share",),
    "skew_kl": ("skew",),
    "skew_reverse_kl": ("skew",),
    "tvd": (),
    "alpha_beta": ("ab_alpha", "ab_beta"),
    "logit_mse": (),
}
"""Divergences that `triton.maths.terms` computes -> the parameters that it takes, two at most."""

Probe = Callable[[torch.device], None]
"""Launches a kernel on a device; raises if that fails."""


FAILURES = (
    RuntimeError,
    ImportError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    subprocess.SubprocessError,
)
"""Errors that triton, torch, a driver and a C compiler raise when a launch fails."""


class CapturingError(RuntimeError):
    """The first launch would be captured in a CUDA graph, so it cannot serve as a test."""


def launch_one_row(device: torch.device) -> None:
    """Compile and launch a kernel over one row on the device's current stream, wait for its result and compare it.

    Raises CapturingError while that stream is captured, otherwise any error of the launch: it needs a C compiler,
    triton's own assembler, and a driver that accepts their output.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise CapturingError(
                    f"row kernels for {device} are requested for the first time while a CUDA graph is captured\n"
                    "  why: auto and triton launch one row first, which must not be captured\n"
                    "  fix: call kdtrain_kernels.row_kernels once before the capture, or choose backend = torch"
                )
    importlib.import_module("kdtrain_kernels.triton.probe").launch(device)


def row_kernels(
    backend: str, device: torch.device, work: torch.dtype = torch.float32, *, probe: Probe = launch_one_row
) -> RowKernels:
    """The row kernels `backend` (auto or one of BACKENDS) names for slabs of dtype `work` on `device`.

    auto takes the result of `choice` and logs the reason once. triton on another device than CUDA runs in triton's
    interpreter, if TRITON_INTERPRET=1. The first call for a device launches one row by `probe` and waits for it. Raises
    ValueError for an unknown name and for triton where it cannot run, CapturingError as `launch_one_row`.
    """
    if backend == "auto":
        name, reason = choice(device, work, probe)
        _log_choice(device, name, reason, work == torch.float32)
        backend = name
    elif backend not in BACKENDS:
        raise ValueError(
            f"backend = {backend!r} is not available for {device.type}; choose auto or {', '.join(BACKENDS)}"
        )
    elif backend == "triton":
        problem = _problem(device, work, probe)
        if problem:
            raise ValueError(f"backend = 'triton' is not available for {device.type}: {problem}; choose torch")
    if backend == "torch":
        return torch_rows
    from kdtrain_kernels.triton import rows  # needs triton, which torch alone does not

    return rows


def pair_kernels(backend: str, device: torch.device, work: torch.dtype, spec: DivergenceSpec) -> RowKernels:
    """The row kernels of `row_kernels` that compute `spec`.

    auto takes torch for a divergence that triton lacks and warns once. Raises ValueError as `row_kernels` does, and
    for an explicit triton without that divergence.
    """
    kernels = row_kernels(backend, device, work)
    if kernels is torch_rows or spec.kernel in TRITON_DIVERGENCES:
        return kernels
    if backend == "auto":
        _log_missing(spec.kernel)
        return torch_rows
    raise ValueError(f"backend = {backend!r} has no row kernels for divergence = {spec.kernel!r}; choose torch or auto")


def divergences_of(backend: str) -> tuple[str, ...]:
    """Divergences that a backend of BACKENDS computes."""
    return tuple(DIVERGENCES) if backend == "torch" else tuple(TRITON_DIVERGENCES)


def choice(device: torch.device, work: torch.dtype = torch.float32, probe: Probe = launch_one_row) -> tuple[str, str]:
    """(the backend of auto on `device`, the reason): triton for float32 on CUDA devices where a launch succeeds, else
    torch.

    Raises CapturingError as `launch_one_row`.
    """
    if device.type != "cuda":
        return "torch", "the device is not CUDA"
    problem = _problem(device, work, probe)
    return ("torch", problem) if problem else ("triton", "the device is CUDA, and one row was launched on it")


def _problem(device: torch.device, work: torch.dtype, probe: Probe) -> str:
    """The reason why triton cannot run; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a CUDA device, or TRITON_INTERPRET=1 for its interpreter"
    if work != torch.float32:
        return f"it works on float32 logits, not {work}"
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _launch_problem(probe, device)


@functools.cache
def _launch_problem(probe: Probe, device: torch.device) -> str:
    """The reason why a launch on `device` fails; empty if it succeeds. Cached: one launch per process and device."""
    try:
        probe(device)
    except CapturingError:
        raise  # not cached: the next call outside the capture launches
    except FAILURES as error:
        lines = str(error).splitlines() or [""]
        return f"a launch on {device} fails with {type(error).__name__}: {lines[0][:300]}"
    return ""


@functools.cache
def _log_choice(device: torch.device, name: str, reason: str, is_float32: bool) -> None:
    """Cached, so that each choice is logged once. A warning if a GPU does not use the triton kernels."""
    is_slow = device.type == "cuda" and name == "torch" and is_float32
    level = logging.WARNING if is_slow else logging.INFO
    logging.getLogger("kdtrain").log(level, "row kernels on %s: %s, because %s", device.type, name, reason)


@functools.cache
def _log_missing(divergence: str) -> None:
    """Cached, so that it is logged once. A warning, as in `_log_choice`: auto takes triton on a GPU only."""
    logging.getLogger("kdtrain").warning("row kernels: torch, because triton has none for divergence %s", divergence)
