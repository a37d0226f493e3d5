"""Large buffers of one call, in huge pages where Linux offers them."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys

import torch
from torch import Tensor

HUGE_BYTES = 1 << 25
"""Buffers of this size, 32 MiB, are mapped apart. glibc keeps smaller ones when they are freed, so that the next call
touches no fresh memory; from here on it maps and unmaps every one, in pages of 4 KiB."""


def fresh(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor, for use within a call: its storage cannot be resized.

    A large one on a CPU under Linux is a mapping of its own, advised to lie in huge pages (without effect where
    transparent huge pages are "never" or "always"): the first touch of 64 MiB takes 27 ms in pages of 4 KiB and 4 ms in
    huge ones, and a call of a streamed loss touches several times as much. The memory returns to the system with the
    tensor, wherever the allocator would have placed it. Does not communicate.
    """
    count = math.prod(shape)
    if device.type != "cpu" or sys.platform != "linux" or count * dtype.itemsize < HUGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    mapping = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without huge pages; the memory is the same
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=dtype, count=count).view(shape)
