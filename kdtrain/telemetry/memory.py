"""Peak memory of this process, in the units and by the names of `metrics.UNITS`."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 1 << 30


def memory_record(device: torch.device | None = None) -> dict[str, float]:
    """Peak memory so far by metric name, in GiB: of the host, and of the CUDA allocator for a CUDA device.

    `device` None: the current CUDA device if there is one. Does not communicate or synchronise.
    """
    found = {"memory/host_gib": peak_host_bytes() / GIB}
    if _is_cuda(device):
        found["memory/peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        found["memory/peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    return found


def peak_host_bytes() -> int:
    """Peak resident set of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def _is_cuda(device: torch.device | None) -> bool:
    return torch.cuda.is_available() if device is None else device.type == "cuda"
