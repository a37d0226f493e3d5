"""Reports of a run: one console line and one record per report, for every sink."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import OutputError
from kdtrain.log import LOGGER, log_failure
from kdtrain.telemetry.console import format_eval, format_step
from kdtrain.telemetry.memory import memory_record
from kdtrain.training.progress import Progress


class Sink(Protocol):
    """A destination of flat records of floats."""

    def write(self, record: dict[str, float]) -> None:
        """Write `record`, which has data/step and data/tokens_seen."""

    def close(self, *, failed: bool = False) -> None:
        """Flush. failed: the run ends with an error."""


@dataclass(frozen=True, slots=True)
class Costs:
    """FLOPs per token of both models, and the peak rate of the devices.

    student: forward and backward; teacher: forward only, 0 without one; peak: FLOP/s of all ranks, None if unknown.
    """

    student: float
    teacher: float = 0.0
    peak: float | None = None

    @property
    def teacher_share(self) -> float:
        """The teacher's share of all FLOPs, in [0, 1)."""
        return self.teacher / (self.teacher + self.student)

    @property
    def equal_flops_tokens(self) -> float:
        """Tokens of plain cross-entropy for the FLOPs of one distilled token (the break-even ratio)."""
        return (self.teacher + self.student) / self.student


class Reporter:
    """Turns means and timings into records and sends them to every sink; silent on ranks other than 0."""

    def __init__(self, sinks: list[Sink], mesh: Mesh, device: torch.device, costs: Costs, total_steps: int) -> None:
        self._sinks = sinks
        self._mesh = mesh
        self._device = device
        self._costs = costs
        self._total_steps = total_steps
        self._last = Progress()
        self._failure: OutputError | None = None

    @property
    def failure(self) -> OutputError | None:
        """The first error of this rank in writing a file, for which the trainer ends the run on all ranks; or None."""
        if self._failure is None and (found := log_failure()) is not None:
            self._failure = OutputError.of(*found)
        return self._failure

    def resumed(self, progress: Progress) -> None:
        """Start the rates of the next report at `progress`."""
        self._last = Progress(progress.step, progress.tokens_seen, progress.train_seconds)

    def step(
        self, progress: Progress, means: dict[str, float], phases: dict[str, float], grad_norm: float, lr: float
    ) -> None:
        """Report the steps since the last call. phases: seconds of those steps by name. Does not communicate."""
        steps = progress.step - self._last.step
        seconds = progress.train_seconds - self._last.train_seconds
        rate = (progress.tokens_seen - self._last.tokens_seen) / max(seconds, 1e-9)
        self._last = Progress(progress.step, progress.tokens_seen, progress.train_seconds)
        record = self._base(progress) | means
        record |= {"optim/lr": lr, "optim/grad_norm": grad_norm, "guard/skipped_steps": float(progress.skipped_steps)}
        record |= {f"time/{name}_s": value / steps for name, value in phases.items()}
        record |= {
            "time/step_s": seconds / steps,
            "throughput/tokens_per_s": rate,
            "throughput/tokens_per_s_per_rank": rate / self._mesh.world_size,
            "throughput/teacher_flops_share": self._costs.teacher_share,
            "throughput/equal_flops_tokens_ratio": self._costs.equal_flops_tokens,
            "time/eta_s": (self._total_steps - progress.step) * seconds / steps,
        }
        if "teacher" in phases:
            record["throughput/teacher_time_share"] = phases["teacher"] / max(seconds, 1e-9)
        if self._costs.peak:
            record["throughput/mfu"] = rate * (self._costs.student + self._costs.teacher) / self._costs.peak
        record |= _derived(record) | memory_record(self._device)
        self._send(record, format_step(record, last_step=self._total_steps))

    def evaluation(self, progress: Progress, means: dict[str, float], seconds: float) -> None:
        """Report one evaluation of the student as it is after `progress.step` steps."""
        record = self._base(progress) | means | {"time/eval_s": seconds}
        record["eval/perplexity"] = math.exp(min(means["eval/val_nll"], 700.0))
        if "eval/tvd" in means:
            record["eval/overlap"] = 1.0 - means["eval/tvd"]
        self._send(record, format_eval(record, self._total_steps))

    def _base(self, progress: Progress) -> dict[str, float]:
        return {
            "data/step": progress.step,
            "data/tokens_seen": progress.tokens_seen,
            "time/train_s": progress.train_seconds,
        }

    def _send(self, record: dict[str, float], line: str) -> None:
        if self._mesh.is_main:
            LOGGER.info(line)
            try:
                for sink in self._sinks:
                    sink.write(record)
            except OutputError as error:  # kept in `failure`: raised here, it would leave the other ranks waiting
                self._failure = self._failure or error

    def close(self, *, failed: bool = False) -> None:
        """Flush and close every sink. failed: the run ends with an error."""
        for sink in self._sinks:
            sink.close(failed=failed)


def _derived(record: dict[str, float]) -> dict[str, float]:
    found = {}
    if "distill/teacher_nll" in record:
        found["distill/gap"] = record["loss/ce"] - record["distill/teacher_nll"]
    if "distill/tvd" in record:
        found["distill/overlap"] = 1.0 - record["distill/tvd"]
    return found
