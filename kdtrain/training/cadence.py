"""At which steps a run reports, evaluates and saves, and whether it has to stop."""

from __future__ import annotations

import signal
import time
from types import FrameType

from kdtrain.training.progress import Progress

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM comes from schedulers and from the launcher, SIGUSR1 from schedulers that send it ahead of a time limit."""


class StopRequest:
    """Whether this rank received a request to stop: a signal, the time limit, or a call of `request`.

    Installing handlers is explicit (`install`). Ranks receive a request at different moments, so the trainer reduces
    `requested` over all ranks once per step.
    """

    def __init__(self, time_limit_s: float | None = None) -> None:
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._signal: int | None = None
        self._reason: str | None = None

    def install(self) -> None:
        """Catch STOP_SIGNALS from now on (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def request(self, reason: str) -> None:
        """Request a stop for another cause than a signal; the first reason is kept."""
        self._reason = self._reason or reason

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    @property
    def _timed_out(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    @property
    def requested(self) -> bool:
        """True once this rank should stop after the current step."""
        return self._reason is not None or self._signal is not None or self._timed_out

    @property
    def reason(self) -> str:
        """The cause of the request, for a message; another rank if this one received none."""
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        if self._timed_out:
            return "run.time_limit_s reached"
        return self._reason or "another rank received a stop request"


class Cadence:
    """Step numbers at which a run reports, evaluates and saves. Steps count from 1; step 0 is the untrained student."""

    def __init__(
        self,
        total_tokens: int,
        tokens_per_step: int,
        begun: Progress | None = None,
        *,
        log_every: int = 1,
        eval_every: int | None = None,
        save_every: int | None = None,
        evaluates: bool = False,
    ) -> None:
        """begun: progress so far, possibly with another tokens_per_step. evaluates: whether there is validation data.

        eval_every: None evaluates before the first and after the last step only. save_every: None saves after the last.
        """
        begun = begun or Progress()
        left = max(0, total_tokens - begun.tokens_seen)
        self.last_step = begun.step + -(-left // tokens_per_step)
        self._log_every, self._eval_every, self._save_every = log_every, eval_every, save_every
        self._evaluates = evaluates

    def log(self, step: int) -> bool:
        """Report after this step: the first, every log_every, the last."""
        return step == 1 or step % self._log_every == 0 or step == self.last_step

    def evaluate(self, step: int) -> bool:
        """Evaluate after this step: before the first, every eval_every, after the last."""
        if not self._evaluates:
            return False
        return step in (0, self.last_step) or (self._eval_every is not None and step % self._eval_every == 0)

    def save(self, step: int) -> bool:
        """Save after this step: every save_every, and the last."""
        return step == self.last_step or (self._save_every is not None and step % self._save_every == 0)
