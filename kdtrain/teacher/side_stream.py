"""A second stream on CUDA, with the same interface on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """On CUDA a second stream; on any other device `start` runs the work at once and nothing overlaps.

    Collectives inside such work need process groups that no other stream uses: NCCL serialises the collectives of a
    communicator, and ranks that issue them in different orders deadlock. Every rank must start work and take results in
    the same order.
    """

    def __init__(
        self, device: torch.device, *, record: Callable[[Tensor, Any], None] = torch.Tensor.record_stream
    ) -> None:
        """record: keeps the allocator from reusing a tensor's memory while a stream may use it. A check that must
        detect its absence (benchmarks/gpu_probe.py) passes a function that does nothing."""
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        """The stream of the work; None where nothing overlaps."""
        self._record = record

    def start(self, work: Callable[[], Tensor], inputs: Iterable[Tensor]) -> Callable[[], Tensor]:
        """Start `work` and return a function that gives its result to the then current stream. Neither blocks the host.

        work: starts after all work queued on the current stream so far, so its inputs are ready and at most two results
        are alive. inputs: the tensors it reads; the caller may drop them after this call.
        """
        side = self.stream
        if side is None:
            computed = work()
            return lambda: computed
        side.wait_stream(torch.cuda.current_stream(side.device))
        for tensor in inputs:
            self._record(tensor, side)  # else the allocator could reuse their memory while `work` reads it
        with torch.cuda.stream(side):
            result = work()
            done = side.record_event()

        def take() -> Tensor:
            current = torch.cuda.current_stream(side.device)
            current.wait_event(done)
            self._record(result, current)  # its memory belongs to the side stream, whose next work could reuse it
            return result

        return take
