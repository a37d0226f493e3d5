"""Work beside the device's current stream, by one code path on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """On CUDA a second stream; on any other device work is done where it is started, at once, and nothing overlaps.

    Collectives inside such work need process groups that nothing on another stream uses: NCCL serialises what shares a
    communicator, and ranks whose devices meet it in different orders wait for each other. Every rank must start work
    and ask for answers in the same order.
    """

    def __init__(
        self, device: torch.device, *, record: Callable[[Tensor, Any], None] = torch.Tensor.record_stream
    ) -> None:
        """record: keeps the allocator from giving a tensor's memory away while a stream may use it. A check that has
        to notice when this is missing (benchmarks/gpu_probe.py) passes one that does nothing."""
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        """What the work runs on; None where nothing overlaps."""
        self._record = record

    def start(self, work: Callable[[], Tensor], inputs: Iterable[Tensor]) -> Callable[[], Tensor]:
        """Start `work`; the answer's call gives its tensor to the then current stream. Neither waits on the host.

        work: begins once all that the current stream has been given so far is done, so its inputs are ready and at
        most the present and the next answer are alive. inputs: what it reads; they may be dropped after this call.
        """
        side = self.stream
        if side is None:
            answer = work()
            return lambda: answer
        side.wait_stream(torch.cuda.current_stream(side.device))
        for tensor in inputs:
            self._record(tensor, side)  # or the allocator could give their memory away while `work` reads it
        with torch.cuda.stream(side):
            result = work()
            done = side.record_event()

        def finish() -> Tensor:
            current = torch.cuda.current_stream(side.device)
            current.wait_event(done)
            self._record(result, current)  # its memory belongs to the side stream, whose next work could take it
            return result

        return finish
