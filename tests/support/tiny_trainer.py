"""A real Trainer around an engine of one weight, for tests of the loop, its guards and its reports."""

import json
import math
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.config.schema import GuardSection
from kdtrain.distributed.collectives import reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.zero import StepResult
from kdtrain.objectives.base import LossOutput
from kdtrain.run_state.heartbeat import PhaseTracker
from kdtrain.telemetry.jsonl_sink import JsonlSink
from kdtrain.training.cadence import Cadence, StopRequest
from kdtrain.training.guards import Events, Guards
from kdtrain.training.progress import Progress
from kdtrain.training.report import Costs, Reporter
from kdtrain.training.timing import PhaseTimer
from kdtrain.training.trainer import LoopSettings, Trainer

CPU = torch.device("cpu")
ALONE = Mesh()
SEQUENCES, SEQ_LEN = 4, 8


class Loader:
    """Steps of two micro-batches of two sequences per data rank; sample ids count up."""

    def __init__(self, mesh: Mesh, position: int = 0) -> None:
        self.position, self.mesh = position, mesh

    def __next__(self) -> list[Batch]:
        first = self.position + self.mesh.dp_rank * SEQUENCES
        self.position += self.mesh.dp_size * SEQUENCES
        ids = torch.ones(2, SEQ_LEN, dtype=torch.int64)
        return [Batch(ids, ids, ids.float(), ids, torch.arange(start, start + 2)) for start in (first, first + 2)]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Engine:
    """Adam on one weight; like the real one, applies no step whose gradient is not finite."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.weight = torch.nn.Parameter(torch.tensor([1.0]))
        self.adam = torch.optim.Adam([self.weight])

    def backward(self, loss: Tensor, tokens: float) -> None:
        (loss / tokens).backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> StepResult:
        assert self.weight.grad is not None
        norm = float(reduce_sum_(self.weight.grad, self.mesh.dp_group).norm())
        if math.isfinite(norm):
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
        self.adam.zero_grad()
        return StepResult(norm, math.isfinite(norm))


class Objective:
    """A loss of about 2 nats per token, or the value of a sample in `values`; its gradient is finite."""

    def __init__(self, engine: Engine, values: Mapping[int, float]) -> None:
        self.engine, self.values = engine, values

    def prefetch(self, micro_batches: Any) -> None:
        pass

    def __call__(self, batch: Batch, *, measure: bool = False) -> LossOutput:
        count = batch.num_valid_tokens()
        noise = [0.01 * math.sin(13.0 * sample) for sample in batch.sample_ids.tolist()]
        value = sum(self.values.get(s, 2.0 + n) for s, n in zip(batch.sample_ids.tolist(), noise, strict=True)) / 2
        loss = (self.engine.weight * noise[0] - (self.engine.weight * noise[0]).detach()).sum() + value
        return LossOutput(loss * count, {"loss/total": (loss.detach() * count, count)})


class Checkpoints:
    """Keeps in memory what a checkpoint would hold, through JSON as the real one does."""

    busy = False

    def __init__(self) -> None:
        self.saved: dict[int, Any] = {}

    def advance(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def save(self, engine: Engine, progress: Progress, data_state: Any, *, wait: bool = True) -> None:
        weight = engine.weight.detach().clone()
        moments = {k: v.clone() for k, v in engine.adam.state_dict()["state"].get(0, {}).items()}
        known = json.loads(json.dumps(asdict(progress)))
        self.saved[progress.step] = (known, engine.adam.state_dict(), data_state, weight, moments)


def tiny_trainer(
    folder: Path,
    steps: int,
    values: Mapping[int, float] | None = None,
    *,
    mesh: Mesh = ALONE,
    saved: Any = None,
    every: int | None = 10,
    log: int = 3,
    prefetch_teacher: bool = False,
    **guard: Any,
) -> Any:
    """A trainer of a run of `steps` steps. values: losses by sample id. saved: what `Checkpoints` kept, to resume from.

    every, log: steps between checkpoints and reports. guard: settings of the guards.
    """
    progress, engine, loader = Progress(), Engine(mesh), Loader(mesh)
    if saved is not None:
        known, adam, data_state, weight, moments = saved
        progress = Progress(**known)
        loader.load_state_dict(data_state)
        engine.weight.data.copy_(weight)
        state = {0: {k: v.clone() for k, v in moments.items()}} if moments else {}
        engine.adam.load_state_dict({**adam, "state": state})
    sinks, events = [], None
    if mesh.is_main:
        files = (JsonlSink(folder / f"{n}.jsonl", resume_step=progress.step, lazy=True) for n in ("skipped", "spikes"))
        sinks, events = [JsonlSink(folder / "metrics.jsonl", resume_step=progress.step)], Events(*files)
    reporter = Reporter(list[Any](sinks), mesh, CPU, Costs(1.0), steps)
    reporter.resumed(progress)
    tokens = mesh.dp_size * SEQUENCES * SEQ_LEN
    parts: dict[str, Any] = {
        "engine": engine,
        "objective": Objective(engine, dict(values or {})),
        "batches": loader,
        "evaluator": SimpleNamespace(run=lambda progress: None),
        "checkpoints": Checkpoints(),
    }
    return Trainer(
        settings=LoopSettings(1, tokens, lambda seen: 3e-4, prefetch_teacher),
        cadence=Cadence(steps * tokens, tokens, progress, log_every=log, save_every=every),
        mesh=mesh,
        device=CPU,
        reporter=reporter,
        # steps of microseconds spend most of their time waiting for data
        guards=Guards(GuardSection(**{"data_wait_share": 1.0, **guard}), mesh, CPU, progress, events),
        timer=PhaseTimer(CPU, PhaseTracker(mesh.rank)),
        stop=StopRequest(),
        progress=progress,
        **parts,
    )


def records_of(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def adam_steps(run: Any) -> int:
    """Steps that Adam has applied."""
    return int(run.engine.adam.state_dict()["state"][0]["step"])


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Refuse to write files past `limit` bytes, as a full disk would."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
