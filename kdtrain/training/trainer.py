"""The loop: draw a step's micro-batches, agree on their token count, learn, step; report, evaluate, save, stop.

What one rank alone has met (a signal, a disk that is full) it tells in that agreement, so that all ranks end together.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.config.schema import RunConfig
from kdtrain.data.loader import StepLoader
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.optim import learning_rate
from kdtrain.engine.zero import StepResult, StudentEngine
from kdtrain.errors import NonFiniteLoss, OutputError, RunStopped
from kdtrain.objectives.base import Objective
from kdtrain.telemetry.metrics import Metrics
from kdtrain.training.cadence import Cadence, StopRequest
from kdtrain.training.checkpoints import Checkpoints
from kdtrain.training.evaluator import Evaluator
from kdtrain.training.guards import Guards, poisoned
from kdtrain.training.progress import Progress
from kdtrain.training.replicas import check_replicas
from kdtrain.training.report import Reporter
from kdtrain.training.timing import PhaseTimer


def step_seed(seed: int, step: int, zero_rank: int) -> int:
    """Seed of whatever is random in a step on a rank (dropout): needs no saved state to be exact after a resume.

    64 bits of a hash, so that neighbouring steps and ranks have nothing in common. Ranks with the same tokens, those of
    a tp group, share it.
    """
    text = f"{seed} {step} {zero_rank}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@dataclass(slots=True)
class Trainer:
    """A run's moving parts. Built by `kdtrain.training.build`; everything here is live on every rank.

    looks_ahead: whether the objective is told of each step one step ahead: a teacher elsewhere need never be idle.
    """

    cfg: RunConfig
    mesh: Mesh
    device: torch.device
    engine: StudentEngine
    objective: Objective
    loader: StepLoader
    evaluator: Evaluator
    checkpoints: Checkpoints
    reporter: Reporter
    guards: Guards
    timer: PhaseTimer
    stop: StopRequest
    progress: Progress = field(default_factory=Progress)
    looks_ahead: bool = False
    _drawn: list[Batch] = field(default_factory=list)

    def run(self) -> None:
        """Train to the end. Raises RunStopped after saving; NonFiniteLoss, OutputError and CheckpointError without."""
        try:
            self._run()
        except NonFiniteLoss:  # raised on all ranks together: what is being written can still be completed
            self.checkpoints.finish()
            raise

    def _run(self) -> None:
        cadence = Cadence(self.cfg, self.progress)
        metrics = Metrics(device=self.device, group=self.mesh.zero_group)
        metrics.load_state(self.progress.metrics)
        if self.progress.step == 0 and cadence.evaluate(0):
            self._evaluate()
        while self.progress.step < cadence.last_step:
            self.timer.pulse.begin(self.progress.step + 1)
            started = time.perf_counter()
            micro_batches, self._drawn = self._drawn or self._next_micro_batches(), []
            num_valid_tokens, stop = self._agree(micro_batches)
            if stop:
                self._save(metrics)
                raise RunStopped(
                    f"stopped at step {self.progress.step} ({self.stop.reason}); saved, resume with the same command"
                )
            measure = cadence.log(self.progress.step + 1)
            more = self.progress.step + 1 < cadence.last_step
            result, lr = self._optimizer_step(micro_batches, num_valid_tokens, metrics, measure, more)
            self.progress.train_seconds += time.perf_counter() - started
            if cadence.log(self.progress.step):
                self._report(metrics, result.grad_norm, lr)
            if cadence.evaluate(self.progress.step):
                self._evaluate()
            if cadence.save(self.progress.step):
                self._save(metrics, wait=self.progress.step == cadence.last_step)
        self._agree([])

    def _next_micro_batches(self) -> list[Batch]:
        with self.timer.phase("data_wait"):
            micro_batches = [batch.to(self.device) for batch in next(self.loader)]
        if self.cfg.debug.check_replicas:
            check_replicas(micro_batches, self.mesh)
        return micro_batches

    def _agree(self, micro_batches: list[Batch]) -> tuple[float, bool]:
        """Global number of valid tokens of this step, and whether any rank wants to stop. One all-reduce, world.

        A checkpoint that is being written goes on to its next stage when all ranks are ready for it. Raises OutputError
        on all ranks if one of them could not write, CheckpointError if that was the checkpoint.
        """
        failure = self.reporter.failure or self.guards.failure
        flags = [float(self.stop.wanted), float(failure is not None), float(self.checkpoints.busy)]
        count = sum(float(batch.on_host().num_valid_tokens()) for batch in micro_batches)
        table = torch.tensor([count, *flags], dtype=torch.float64)
        if self.mesh.world_size > 1:
            table = table.to(self.device)
            # The loss is divided by the tokens of all ranks. A stop or a failure on one rank must end the step on all:
            # the others would wait for it in the step's collectives.
            dist.all_reduce(table, group=self.mesh.world_group)
        valid, stop, failed, busy = table.tolist()
        if failed:
            raise failure or OutputError("another rank cannot write its files; its message says which and why")
        if not busy:
            self.checkpoints.advance()
        # every tp rank counted the same tokens; cp ranks counted each their own
        return valid / self.mesh.tp_size, stop > 0

    def _optimizer_step(
        self, micro_batches: list[Batch], num_valid_tokens: float, metrics: Metrics, measure: bool, more: bool
    ) -> tuple[StepResult, float]:
        """Sums of the micro-batches divided by one global token count, then one optimizer step, counted in progress."""
        # the rate belongs to the tokens this step completes: the first step is not wasted on a rate of 0
        lr = learning_rate(self.progress.tokens_seen + self.cfg.data.tokens_per_step, self.cfg)
        torch.manual_seed(step_seed(self.cfg.run.seed, self.progress.step, self.mesh.zero_rank))
        self.objective.begin_step(micro_batches)
        if self.looks_ahead and more:  # the place in the data that a checkpoint keeps is counted by steps done
            self._drawn = self._next_micro_batches()
            self.objective.begin_step(self._drawn)
        sums: list[tuple[str, Tensor, Tensor]] = []
        losses: list[tuple[Tensor, Tensor]] = []
        for batch in micro_batches:
            with self.timer.phase("forward"):
                out = self.objective(batch, measure=measure)
            with self.timer.phase("backward"):
                self.engine.backward(poisoned(out.loss_sum), num_valid_tokens)
            sums += [(name, *pair) for name, pair in out.metrics.items()]
            losses.append((out.loss_sum.detach(), batch.num_valid_tokens()))
        with self.timer.phase("optimizer"):
            result = self.engine.step(lr)
        self.progress.step += 1
        self.progress.tokens_seen += self.cfg.data.tokens_per_step
        if result.applied:
            self.guards.applied(micro_batches, losses)
            for name, total, count in sums:  # not before: a skipped step must not make a report's means nan
                metrics.add(name, total, count)
        else:
            self.guards.skipped(micro_batches, result.grad_norm)
        return result, lr

    def _report(self, metrics: Metrics, grad_norm: float, lr: float) -> None:
        self.guards.look_at_losses()
        phases = self.timer.read()
        means = metrics.reduce() | self.guards.look_at_ranks(phases)
        self.reporter.step(self.progress, means, phases, grad_norm, lr)

    def _evaluate(self) -> None:
        with self.timer.pulse.phase("evaluate", apart=True):
            self.evaluator.run(self.progress)

    def _save(self, metrics: Metrics, *, wait: bool = True) -> None:
        with self.timer.pulse.phase("save", apart=True):
            self.guards.look_at_losses()
            self.progress.metrics = metrics.state()
            sequences = self.progress.tokens_seen // self.cfg.data.seq_len
            self.checkpoints.save(self.engine, self.progress, self.loader, sequences, wait=wait)

    def close(self, *, failed: bool = False) -> None:
        """Let go of the report's files; `failed`: the run ends by an error. Raises OutputError unless `failed`."""
        self.guards.close(failed=failed)
        self.reporter.close(failed=failed)
