"""When to report, evaluate, save and stop."""

from __future__ import annotations

import signal
import time
from types import FrameType

from kdtrain.config.schema import RunConfig
from kdtrain.training.progress import Progress

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM comes from schedulers and from the launcher, SIGUSR1 from schedulers that warn ahead."""


class StopRequest:
    """Whether this rank has been asked to stop: by a signal, or by the time limit.

    Installing handlers is explicit (`install`). Ranks learn of it at different moments, so the trainer reduces `wanted`
    over all ranks once per step.
    """

    def __init__(self, time_limit_s: float | None = None) -> None:
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._signal: int | None = None
        self._asked: str | None = None

    def install(self) -> None:
        """Catch STOP_SIGNALS from now on (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def ask(self, reason: str) -> None:
        """Want to stop, because of something that this process learned otherwise than by a signal."""
        self._asked = self._asked or reason

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    @property
    def wanted(self) -> bool:
        """True once this rank should stop after the current step."""
        if self._asked is not None:
            return True
        return self._signal is not None or (self._deadline is not None and time.monotonic() >= self._deadline)

    @property
    def reason(self) -> str:
        """Why, in a few words."""
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "run.time_limit_s reached"
        if self._asked is not None:
            return self._asked
        return "another rank was asked to stop"


class Cadence:
    """Step numbers at which things happen. Steps count from 1; step 0 is the untrained student."""

    def __init__(self, cfg: RunConfig, begun: Progress | None = None) -> None:
        """begun: what has been trained already, maybe with another data.tokens_per_step."""
        begun = begun or Progress()
        left = max(0, cfg.train.total_tokens - begun.tokens_seen)
        self.last_step = begun.step + -(-left // cfg.data.tokens_per_step)
        self._log_every = cfg.log.every_steps
        self._eval_every = cfg.eval.every_steps
        self._save_every = cfg.checkpoint.every_steps
        self._evaluates = cfg.data.validation is not None

    def log(self, step: int) -> bool:
        """Report after this step: the first, every log.every_steps, the last."""
        return step == 1 or step % self._log_every == 0 or step == self.last_step

    def evaluate(self, step: int) -> bool:
        """Evaluate after this step: before the first, every eval.every_steps, after the last."""
        if not self._evaluates:
            return False
        return step in (0, self.last_step) or (self._eval_every is not None and step % self._eval_every == 0)

    def save(self, step: int) -> bool:
        """Save after this step: every checkpoint.every_steps, and the last."""
        return step == self.last_step or (self._save_every is not None and step % self._save_every == 0)
