"""One rank of benchmarks/bench_step.py: builds the parts of a run and times rounds of steps by the run's own
trainer."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measuring as common

PHASES = ("data", "teacher", "decoder", "head", "backward", "optimizer", "rest")
DOCUMENT_TOKENS = 300


def configuration(job: dict) -> Any:
    """The parts of a run's configuration that determine the computation."""
    from kdtrain.config.schema import RunConfig

    cfg = RunConfig()
    cfg.student.architecture, cfg.student.dtype = job["student"], job["dtype"]
    cfg.teacher.dtype, cfg.parallel.tp, cfg.zero.stage = job["dtype"], job["tp"], job["zero"]
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch = job["seq_len"], job["micro"]
    cfg.data.tokens_per_step = job["seq_len"] * job["sequences"]
    cfg.train.slab_bytes, cfg.train.total_tokens = job["slab_bytes"], job["steps"] * cfg.data.tokens_per_step
    cfg.log.every_steps = 1
    return cfg


def random_inputs(folder: Path, job: dict, main: bool) -> Any:
    """A store of random tokens of the job's vocabulary, as inputs of a run. Rank 0 writes."""
    import numpy as np
    import torch.distributed as dist
    from tokenizers import Tokenizer, models

    from kdtrain.data.token_store import TokenStore
    from kdtrain.jobs.inputs import Inputs
    from tests.support.tiny_data import SEPARATOR, write_store

    if main:
        vocab = {SEPARATOR: 0, **{f"w{number}": number for number in range(1, job["vocab"])}}
        (folder / "tokenizer").mkdir()
        Tokenizer(models.WordLevel(vocab, unk_token=SEPARATOR)).save(str(folder / "tokenizer" / "tokenizer.json"))
        documents = 8 + job["sequences"] * job["seq_len"] * job["steps"] // DOCUMENT_TOKENS
        random = np.random.default_rng(0)
        ids = random.integers(1, job["vocab"], size=(documents, DOCUMENT_TOKENS))
        write_store(folder / "store", ids.tolist(), folder / "tokenizer")
    dist.barrier()
    return Inputs((TokenStore.open(folder / "store"),), None, job["vocab"], job["vocab"])


class TimedHead:
    """A student whose head, with the loss and its gradients, is counted under the phase "head"."""

    def __init__(self, student: Any, timer: Any) -> None:
        self._student, self._timer = student, timer

    def __call__(self, batch: Any, head_fn: Any) -> Any:
        def timed(hidden: Any, head: Any) -> Any:
            with self._timer.phase("head"):
                return head_fn(hidden, head)

        return self._student(batch, timed)


class Unmeasured:
    """An objective without the metrics that need another pass over the logits."""

    def __init__(self, objective: Any) -> None:
        self.prefetch, self._objective = objective.prefetch, objective

    def __call__(self, batch: Any, *, measure: bool = False) -> Any:
        return self._objective(batch)


class Stopwatch:
    """Replaces a run's reporter: seconds between reports, which the trainer makes after every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.phases: list[dict[str, float]] = []
        self.failure = None
        self._last = time.perf_counter()

    def step(self, progress: Any, means: Any, phases: dict[str, float], grad_norm: float, lr: float) -> None:
        """Record the time. The timer was read just before, which synchronises a CUDA device."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.phases.append(split(phases, now - self._last))
        self._last = time.perf_counter()


def split(phases: dict[str, float], step: float) -> dict[str, float]:
    """The trainer's nested phases as disjoint ones that add up to the step."""
    teacher, head = phases.get("teacher", 0.0), phases["head"]
    found = {
        "data": phases["data_wait"],
        "teacher": teacher,
        "decoder": phases["forward"] - teacher - head,
        "head": head,
        "backward": phases["backward"],
        "optimizer": phases["optimizer"],
    }
    return {**found, "rest": step - sum(found.values())}


class Bench:
    """Models, engine and data of a job on this rank."""

    def __init__(self, job: dict, folder: Path) -> None:
        import torch

        from kdtrain.distributed.mesh import Mesh
        from kdtrain.engine import bootstrap
        from kdtrain.engine.zero import StudentEngine
        from kdtrain.jobs.build.batches import build_loader
        from kdtrain.jobs.build.models import build_models, engine_settings
        from kdtrain.jobs.build.teacher import build_teacher
        from kdtrain.models.load import ModelSpec
        from kdtrain.training.timing import PhaseTimer

        rank = bootstrap.start()
        self.cfg, self.device, self.mesh = configuration(job), rank.device, Mesh.build(job["tp"])
        self.inputs = random_inputs(folder, job, self.mesh.is_main)
        gc.collect()
        self.before = self.memory_now()
        models = build_models(self.cfg, self.inputs, self.mesh, self.device, trainable=True)
        spec = ModelSpec(architecture=job["teacher"], dtype=job["dtype"])
        teacher, backbone = build_teacher(self.cfg, spec, models.student.shard, self.mesh, self.device)
        self.models = replace(models, teacher=teacher, teacher_backbone=backbone)
        self.engine = StudentEngine(self.models.student, self.mesh, engine_settings(self.cfg), device=self.device)
        self.timer = PhaseTimer(self.device)
        self.batches = [batch.to(self.device) for batch in next(build_loader(self.cfg, self.inputs, self.mesh))]
        self.threads = torch.get_num_threads()

    def memory_now(self) -> int:
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return common.reset_peak()

    def peak(self) -> int:
        """Bytes beyond what was in use before the models."""
        import torch

        now = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else common.memory("VmHWM")
        return now - self.before

    def steps(self, mode: str) -> Stopwatch:
        """One round of `mode`, distill or lm, by the trainer of a run."""
        from kdtrain.jobs.build.batches import build_loader
        from kdtrain.jobs.build.loop import cadence_of, loop_settings
        from kdtrain.jobs.build.objective import build_objective
        from kdtrain.training.cadence import StopRequest
        from kdtrain.training.guards import Guards
        from kdtrain.training.progress import Progress
        from kdtrain.training.trainer import Trainer

        self.cfg.objective.name = "distill" if mode == "distill" else "pretrain"
        student: Any = TimedHead(self.engine, self.timer)
        objective = build_objective(self.cfg, student, self.models, self.timer)
        nothing: Any = SimpleNamespace(save=lambda *given, **how: None, busy=False, advance=lambda: None)
        loader = build_loader(self.cfg, self.inputs, self.mesh, pin_memory=self.device.type == "cuda")
        watch: Any = Stopwatch()
        progress = Progress()
        trainer = Trainer(
            settings=loop_settings(self.cfg),
            cadence=cadence_of(self.cfg),
            mesh=self.mesh,
            device=self.device,
            engine=self.engine,
            objective=Unmeasured(objective),
            batches=loader,
            evaluator=nothing,
            checkpoints=nothing,
            reporter=watch,
            timer=self.timer,
            stop=StopRequest(),
            guards=Guards(self.cfg.guard, self.mesh, self.device, progress),
            progress=progress,
        )
        try:
            trainer.run()
        finally:
            loader.close()
        return watch

    def teacher_forward(self) -> float:
        """Seconds for one step's micro-batches: hidden states, then logits of this rank's rows, 128 tokens at once."""
        import torch

        teacher = self.models.teacher
        assert teacher is not None
        self.synchronise()
        started = time.perf_counter()
        with torch.no_grad():
            teacher.prefetch(self.batches)
            for batch in self.batches:
                signal = teacher.signal(batch)
                for hidden in signal.hidden_states.split(128):
                    torch.mm(hidden, signal.head.weight.T)
        self.synchronise()
        return time.perf_counter() - started

    def synchronise(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def estimate(self, job: dict) -> Any:
        """Bytes per rank, from shapes alone."""
        from kdtrain.jobs.header import memory_inputs
        from kdtrain.models.load import ModelSpec, model_info
        from kdtrain.planning.estimate import ModelSize, estimate_memory

        def size(name: str) -> ModelSize:
            info = model_info(ModelSpec(architecture=name, dtype=job["dtype"]), job["vocab"])
            config = info.config
            return ModelSize(
                info.num_parameters,
                config.hidden_size,
                config.num_hidden_layers,
                job["vocab"],
                num_heads=config.num_attention_heads,
                inner_width=config.intermediate_size,
            )

        assert self.models.teacher_backbone is not None
        names = [model.config._attn_implementation for model in (self.models.student, self.models.teacher_backbone)]
        sizes = size(job["student"]), size(job["teacher"])
        return estimate_memory(
            memory_inputs(self.cfg),
            *sizes,
            dp_size=self.mesh.dp_size,
            on_cuda=self.device.type == "cuda",
            student_attention=names[0],
            teacher_attention=names[1],
        )


def warm_up(job: dict, folder: Path) -> None:
    """A step of tiny models, so that one-time imports and allocations are not counted as the job's memory."""
    from kdtrain.models.tiny import tiny_config

    tiny = {**job, "vocab": 384, "seq_len": 16, "sequences": 2 * job["ranks"], "micro": 1, "steps": 1}
    for role, name in (("student", "llama"), ("teacher", "qwen3")):
        tiny[role] = str(folder / f"{role}_of_{job['rank']}.json")
        Path(tiny[role]).write_text(json.dumps(tiny_config(name)))
    (folder / "warm_up").mkdir(exist_ok=True)
    bench = Bench(tiny, folder / "warm_up")
    bench.steps("distill")
    bench.engine.close()


def measure(job: dict) -> dict:
    """One job on this rank. The first round warms up; the first step of a round waits for the loader and is dropped."""
    folder = Path(job["folder"])
    warm_up(job, folder)
    bench = Bench(job, folder)
    seconds: dict[str, list[float]] = defaultdict(list)
    phases: dict[str, list[dict[str, float]]] = defaultdict(list)
    peak = 0
    for number in range(job["rounds"]):
        for mode in ("distill", "lm"):
            watch = bench.steps(mode)
            if number == 0 and mode == "distill":
                peak = bench.peak()
            elif number > 0:
                seconds[mode] += watch.seconds[1:]
                phases[mode] += watch.phases[1:]
        forwards = [bench.teacher_forward() for _ in range(job["steps"] - 1)]
        seconds["teacher"] += forwards if number > 0 else []
    estimate = bench.estimate(job)
    means = {mode: {p: statistics.mean(one[p] for one in some) for p in PHASES} for mode, some in phases.items()}
    return {
        "device": device_name(bench.device),
        "threads": bench.threads,
        "seconds": seconds,
        "phases": means,
        "peak_bytes": peak,
        "parts": estimate.parts,
        "estimate_bytes": estimate.total,
    }


def device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else common.cpu_name()
