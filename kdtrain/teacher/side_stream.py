"""Work beside the device's current stream, by one code path on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class SideStream:
    """On CUDA a second stream; on any other device work is done where it is started, at once, and nothing overlaps.

    Collectives inside such work need process groups that nothing on another stream uses: NCCL serialises what shares a
    communicator, and ranks whose devices meet it in different orders wait for each other. Every rank must start work
    and ask for answers in the same order.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[[], Tensor], inputs: Iterable[Tensor]) -> Callable[[], Tensor]:
        """Start `work`; the answer's call gives its tensor to the then current stream. Neither waits on the host.

        work: begins once all that the current stream has been given so far is done, so its inputs are ready and at
        most the present and the next answer are alive. inputs: what it reads; they may be dropped after this call.
        """
        side = self._stream
        if side is None:
            answer = work()
            return lambda: answer
        side.wait_stream(torch.cuda.current_stream(side.device))
        for tensor in inputs:
            tensor.record_stream(side)  # or the allocator could give their memory away while `work` reads it
        with torch.cuda.stream(side):
            result = work()
            done = side.record_event()

        def finish() -> Tensor:
            current = torch.cuda.current_stream(side.device)
            current.wait_event(done)
            result.record_stream(current)  # its memory belongs to the side stream, whose next work could take it
            return result

        return finish
