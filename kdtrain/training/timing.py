"""Time of a step by phase, without synchronising the device at every phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kdtrain.run_state.heartbeat import PhaseTracker


class PhaseTimer:
    """Seconds per named phase since the last `read`.

    On CUDA a phase is measured by events that only `read` reads (one synchronisation per report), elsewhere by the
    wall clock. tracker: records every phase for the heartbeats of this rank.
    """

    def __init__(self, device: torch.device, tracker: PhaseTracker | None = None) -> None:
        self.tracker = tracker or PhaseTracker()
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under `name`; phases may nest under different names."""
        with self.tracker.phase(name):
            if self._cuda:
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                begin.record()
                yield
                end.record()
                self._events.append((name, begin, end))
            else:
                started = time.perf_counter()
                yield
                self._seconds[name] += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Seconds per phase, then reset to zero. Synchronises the device once."""
        if self._cuda:
            torch.cuda.synchronize()
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1000.0
            self._events.clear()
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds
