"""The training loop: micro-batches, global token count, forward, backward, optimizer; report, evaluate, save.

Rank-local events (a signal, a full disk) are reduced together with the token count, so all ranks stop at the same step.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdtrain.batch import Batch, BatchSource
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.zero import StepResult, StudentEngine
from kdtrain.errors import NonFiniteLoss, OutputError, RunStopped
from kdtrain.objectives.base import Objective
from kdtrain.telemetry.metrics import Metrics
from kdtrain.training.cadence import Cadence, StopRequest
from kdtrain.training.checkpoints import Checkpoints
from kdtrain.training.evaluator import Evaluator
from kdtrain.training.guards import Guards, nan_if_nonfinite
from kdtrain.training.progress import Progress
from kdtrain.training.replicas import check_replicas
from kdtrain.training.report import Reporter
from kdtrain.training.timing import PhaseTimer


def step_seed(seed: int, step: int, zero_rank: int) -> int:
    """Seed of a step's random numbers (dropout) on a rank; with it a resumed run is exact without a saved random state.

    64 bits of a hash, so that seeds of neighbouring steps and ranks are unrelated. The ranks of a tp group, which hold
    the same tokens, get the same seed.
    """
    text = f"{seed} {step} {zero_rank}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """Values of a configuration that the loop reads.

    learning_rate: the rate as a function of the tokens seen. prefetch_teacher: hand each step's micro-batches to the
    objective one step ahead, so that a dedicated teacher computes while the student trains. check_replicas: compare the
    micro-batches of all tp and cp ranks in every step.
    """

    seed: int
    tokens_per_step: int
    learning_rate: Callable[[int], float]
    prefetch_teacher: bool = False
    check_replicas: bool = False


@dataclass(slots=True)
class Trainer:
    """The loop of one run on this rank. Every rank holds one and calls the same methods.

    Steps are counted in `progress`, which the guards, the reporter and the checkpoints share.
    """

    settings: LoopSettings
    cadence: Cadence
    mesh: Mesh
    device: torch.device
    engine: StudentEngine
    objective: Objective
    batches: BatchSource
    evaluator: Evaluator
    checkpoints: Checkpoints
    reporter: Reporter
    guards: Guards
    timer: PhaseTimer
    stop: StopRequest
    progress: Progress = field(default_factory=Progress)
    _prefetched: list[Batch] = field(default_factory=list)
    _data_state: dict[str, Any] = field(default_factory=dict)
    """Of the batch source after the last completed step, for a checkpoint; the source itself may be further."""

    def run(self) -> None:
        """Train to the end. Raises RunStopped after saving; NonFiniteLoss, OutputError and CheckpointError without."""
        try:
            self._run()
        except NonFiniteLoss:  # raised on all ranks at the same step, so the collectives of a write still match
            self.checkpoints.wait()
            raise

    def _run(self) -> None:
        cadence = self.cadence
        metrics = Metrics(device=self.device, group=self.mesh.zero_group)
        metrics.load_state(self.progress.metrics)
        self._data_state = self.batches.state_dict()
        if self.progress.step == 0 and cadence.evaluate(0):
            self._evaluate()
        while self.progress.step < cadence.last_step:
            self.timer.tracker.begin(self.progress.step + 1)
            started = time.perf_counter()
            micro_batches, self._prefetched = self._prefetched or self._next_micro_batches(), []
            num_valid_tokens, stop = self.sync_step_state(micro_batches)
            if stop:
                self._save(metrics)
                raise RunStopped(
                    f"stopped at step {self.progress.step} ({self.stop.reason}); saved, resume with the same command"
                )
            measure = cadence.log(self.progress.step + 1)
            has_next = self.progress.step + 1 < cadence.last_step
            result, lr = self._optimizer_step(micro_batches, num_valid_tokens, metrics, measure, has_next)
            self.progress.train_seconds += time.perf_counter() - started
            if cadence.log(self.progress.step):
                self._report(metrics, result.grad_norm, lr)
            if cadence.evaluate(self.progress.step):
                self._evaluate()
            if cadence.save(self.progress.step):
                self._save(metrics, wait=self.progress.step == cadence.last_step)
        self.sync_step_state([])  # a failure to write after the last step must end all ranks with an error

    def _next_micro_batches(self) -> list[Batch]:
        with self.timer.phase("data_wait"):
            micro_batches = [batch.to(self.device) for batch in next(self.batches)]
        if self.settings.check_replicas:
            check_replicas(micro_batches, self.mesh)
        return micro_batches

    def sync_step_state(self, micro_batches: list[Batch]) -> tuple[float, bool]:
        """Valid tokens of this step over all ranks, and whether any rank received a stop request.

        Moves a checkpoint that is being written to its next stage when no rank is busy. Communicates: one all-reduce
        over the world. Raises OutputError on all ranks if one of them could not write its files, CheckpointError if a
        checkpoint could not be written.
        """
        failure = self.reporter.failure or self.guards.failure
        flags = [float(self.stop.requested), float(failure is not None), float(self.checkpoints.busy)]
        count = sum(float(batch.on_host().num_valid_tokens()) for batch in micro_batches)
        table = torch.tensor([count, *flags], dtype=torch.float64)
        if self.mesh.world_size > 1:
            table = table.to(self.device)
            # All ranks need the global token count to scale their gradients, and the flags of every rank: a rank that
            # stopped alone would leave the others waiting in the next collective.
            dist.all_reduce(table, group=self.mesh.world_group)
        valid, stop, failed, busy = table.tolist()
        if failed:
            raise failure or OutputError("another rank cannot write its files; its message names the file")
        if not busy:
            self.checkpoints.advance()
        # tp ranks counted the same tokens, cp ranks different ones
        return valid / self.mesh.tp_size, stop > 0

    def _optimizer_step(
        self, micro_batches: list[Batch], num_valid_tokens: float, metrics: Metrics, measure: bool, has_next: bool
    ) -> tuple[StepResult, float]:
        """Accumulate gradients of the micro-batches over the global token count, then take one optimizer step."""
        # of the tokens at the end of this step: at the beginning of the warm-up the rate would be 0
        lr = self.settings.learning_rate(self.progress.tokens_seen + self.settings.tokens_per_step)
        torch.manual_seed(step_seed(self.settings.seed, self.progress.step, self.mesh.zero_rank))
        data_state = self.batches.state_dict()  # before micro-batches of the next step are taken
        self.objective.prefetch(micro_batches)
        if self.settings.prefetch_teacher and has_next:
            self._prefetched = self._next_micro_batches()
            self.objective.prefetch(self._prefetched)
        sums: list[tuple[str, Tensor, Tensor]] = []
        losses: list[tuple[Tensor, Tensor]] = []
        for batch in micro_batches:
            with self.timer.phase("forward"):
                out = self.objective(batch, measure=measure)
            with self.timer.phase("backward"):
                self.engine.backward(nan_if_nonfinite(out.loss_sum), num_valid_tokens)
            sums += [(name, *pair) for name, pair in out.metrics.items()]
            losses.append((out.loss_sum.detach(), batch.num_valid_tokens()))
        with self.timer.phase("optimizer"):
            result = self.engine.step(lr)
        self._data_state = data_state
        self.progress.step += 1
        self.progress.tokens_seen += self.settings.tokens_per_step
        if result.applied:
            self.guards.applied(micro_batches, losses)
            for name, total, count in sums:  # only of applied steps: a skipped one would make the report's means nan
                metrics.add(name, total, count)
        else:
            self.guards.skipped(micro_batches, result.grad_norm)
        return result, lr

    def _report(self, metrics: Metrics, grad_norm: float, lr: float) -> None:
        self.guards.check_losses()
        phases = self.timer.read()
        means = metrics.reduce() | self.guards.check_ranks(phases)
        self.reporter.step(self.progress, means, phases, grad_norm, lr)

    def _evaluate(self) -> None:
        with self.timer.tracker.phase("evaluate", apart=True):
            self.evaluator.run(self.progress)

    def _save(self, metrics: Metrics, *, wait: bool = True) -> None:
        with self.timer.tracker.phase("save", apart=True):
            self.guards.check_losses()
            self.progress.metrics = metrics.state()
            self.checkpoints.save(self.engine, self.progress, self._data_state, wait=wait)

    def close(self, *, failed: bool = False) -> None:
        """Close the files of guards and reporter. failed: the run ends with an error; else raises OutputError."""
        self.guards.close(failed=failed)
        self.reporter.close(failed=failed)
