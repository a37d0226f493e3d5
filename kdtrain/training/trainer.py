"""The loop: draw a step's micro-batches, agree on their token count, learn, step; report, evaluate, save, stop."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from kdtrain.config.schema import RunConfig
from kdtrain.data.batch import Batch
from kdtrain.data.loader import StepLoader
from kdtrain.dist.mesh import Mesh
from kdtrain.engine.optim import learning_rate
from kdtrain.engine.zero import StepResult, StudentEngine
from kdtrain.errors import NonFiniteLoss, RunStopped
from kdtrain.objectives.base import Objective
from kdtrain.telemetry.metrics import Metrics
from kdtrain.training.cadence import Cadence, StopRequest
from kdtrain.training.checkpoints import Checkpoints
from kdtrain.training.evaluator import Evaluator
from kdtrain.training.progress import Progress
from kdtrain.training.replicas import check_replicas
from kdtrain.training.report import Reporter
from kdtrain.training.timing import PhaseTimer


def step_seed(seed: int, step: int, dp_rank: int) -> int:
    """Seed of whatever is random in a step on a data rank (dropout): needs no saved state to be exact after a resume.

    64 bits of a hash, so that neighbouring steps and ranks have nothing in common. tp ranks of a data rank share it.
    """
    text = f"{seed} {step} {dp_rank}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@dataclass(slots=True)
class Trainer:
    """A run's moving parts. Built by `kdtrain.training.build`; everything here is live on every rank."""

    cfg: RunConfig
    mesh: Mesh
    device: torch.device
    engine: StudentEngine
    objective: Objective
    loader: StepLoader
    evaluator: Evaluator
    checkpoints: Checkpoints
    reporter: Reporter
    timer: PhaseTimer
    stop: StopRequest
    progress: Progress = field(default_factory=Progress)

    def run(self) -> None:
        """Train to the end. Raises RunStopped after saving, NonFiniteLoss without."""
        cadence = Cadence(self.cfg, self.progress)
        metrics = Metrics(device=self.device, group=self.mesh.dp_group)
        metrics.load_state(self.progress.metrics)
        if self.progress.step == 0 and cadence.evaluate(0):
            self.evaluator.run(self.progress)
        while self.progress.step < cadence.last_step:
            started = time.perf_counter()
            micro_batches = self._next_micro_batches()
            num_valid_tokens, stop = self._agree(micro_batches)
            if stop:
                self._save(metrics)
                raise RunStopped(
                    f"stopped at step {self.progress.step} ({self.stop.reason}); saved, resume with the same command"
                )
            measure = cadence.log(self.progress.step + 1)
            result, lr = self._optimizer_step(micro_batches, num_valid_tokens, metrics, measure)
            self.progress.step += 1
            self.progress.tokens_seen += self.cfg.data.tokens_per_step
            self.progress.train_seconds += time.perf_counter() - started
            if cadence.log(self.progress.step):
                self.reporter.step(self.progress, metrics.reduce(), self.timer.read(), result.grad_norm, lr)
            if cadence.evaluate(self.progress.step):
                self.evaluator.run(self.progress)
            if cadence.save(self.progress.step):
                self._save(metrics)

    def _next_micro_batches(self) -> list[Batch]:
        with self.timer.phase("data_wait"):
            micro_batches = [batch.to(self.device) for batch in next(self.loader)]
        if self.cfg.debug.check_replicas:
            check_replicas(micro_batches, self.mesh)
        return micro_batches

    def _agree(self, micro_batches: list[Batch]) -> tuple[float, bool]:
        """Global number of valid tokens of this step, and whether any rank wants to stop. One all-reduce, world."""
        local = torch.stack([batch.num_valid_tokens() for batch in micro_batches]).sum()
        table = torch.stack([local, torch.tensor(float(self.stop.wanted), dtype=torch.float64, device=local.device)])
        if self.mesh.world_size > 1:
            dist.all_reduce(table, group=self.mesh.world_group)
        valid, stop = table.tolist()
        # every tp rank of a data rank counted the same tokens
        return valid / self.mesh.tp_size, stop > 0

    def _optimizer_step(
        self, micro_batches: list[Batch], num_valid_tokens: float, metrics: Metrics, measure: bool
    ) -> tuple[StepResult, float]:
        """Sums of the micro-batches divided by one global token count, then one optimizer step."""
        # the rate belongs to the tokens this step completes: the first step is not wasted on a rate of 0
        lr = learning_rate(self.progress.tokens_seen + self.cfg.data.tokens_per_step, self.cfg)
        torch.manual_seed(step_seed(self.cfg.run.seed, self.progress.step, self.mesh.dp_rank))
        self.objective.begin_step(micro_batches)
        for batch in micro_batches:
            with self.timer.phase("forward"):
                out = self.objective(batch, measure=measure)
            with self.timer.phase("backward"):
                self.engine.backward(out.loss_sum, num_valid_tokens)
            for name, (total, count) in out.metrics.items():
                metrics.add(name, total, count)
        with self.timer.phase("optimizer"):
            result = self.engine.step(lr)
        if not result.applied:
            ids = [int(i) for batch in micro_batches for i in batch.sample_ids.tolist()]
            raise NonFiniteLoss(
                f"step {self.progress.step + 1}: the gradient norm is {result.grad_norm}; the step was not applied\n"
                f"  samples of this rank: {ids}\n"
                "  why: the loss or a gradient overflowed; often the learning rate is too high or the data is damaged\n"
                "  fix: lower optim.lr, lengthen schedule.warmup_tokens, or continue from the last checkpoint"
            )
        return result, lr

    def _save(self, metrics: Metrics) -> None:
        self.progress.metrics = metrics.state()
        sequences = self.progress.tokens_seen // self.cfg.data.seq_len
        self.checkpoints.save(self.engine, self.progress, self.loader, sequences)
