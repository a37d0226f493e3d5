"""A pool of ranks (gloo by default) for many tests, so that a multi-rank test takes milliseconds.

Workers come from a forkserver that has torch (and, for engine tests, deepspeed) imported already. Jobs are sent as
(file, function name, kwargs); a worker loads the file by path and calls function(rank, world_size, **kwargs).
"""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing as mp
import os
import pickle
import queue
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

TIMEOUT_S = 120.0

ENGINE_MODULES = (
    "torch",
    "torch._dynamo",
    "torch._inductor.utils",
    "torch._functorch.aot_autograd",
    "deepspeed",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.llama.modeling_llama",
    "kdtrain.models.load",
    "kdtrain.engine.zero",
    "kdtrain.engine.checkpoint",
)
"""Modules for ranks that build engines; they take seconds to import. A fork server imports them once for all ranks."""


def load_file(path: str | Path) -> ModuleType:
    """The module of a file outside of packages (a test, a script), loaded once per process. Raises ValueError."""
    name = "file_" + hashlib.sha256(str(path).encode()).hexdigest()[:16] + "_" + Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _worker(rank: int, world_size: int, store: str, jobs: Any, results: Any, env: dict[str, str], backend: str) -> None:
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)  # before NCCL's first communicator
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
    while (job := jobs.get()) is not None:
        path, name, kwargs = job
        try:
            function = getattr(load_file(path), name)
            answer: tuple[int, Any, str | None] = (rank, function(rank, world_size, **kwargs), None)
            pickle.dumps(answer)
        except BaseException as error:  # any exception of the test, also SystemExit
            answer = (rank, None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        results.put(answer)
    # No rank may close its connections while another still uses them.
    dist.barrier()
    dist.destroy_process_group()
    results.close()
    results.join_thread()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort at interpreter exit


class RankPool:
    """`world_size` live processes; `run` calls a module-level function on all of them and returns their answers.

    env: set in every rank before a test's file is loaded there. preload: imported once by the fork server that all
    pools of this process share, unless it is running already. fresh: new interpreters instead, which have imported
    nothing before env is set. backend: of torch.distributed; nccl gives rank i the CUDA device i, and needs fresh, as
    CUDA cannot be used in a fork of a process that has initialised it.
    """

    def __init__(
        self,
        world_size: int,
        env: dict[str, str] | None = None,
        preload: tuple[str, ...] = ("torch",),
        *,
        fresh: bool = False,
        backend: str = "gloo",
    ) -> None:
        if backend == "nccl" and not fresh:
            raise ValueError("backend = 'nccl' needs fresh = True: CUDA does not survive a fork")
        self.world_size = world_size
        self._backend = backend
        self._env = env or {}
        self._context: Any = mp.get_context("spawn" if fresh else "forkserver")
        if not fresh:
            self._context.set_forkserver_preload(list(preload))
        self._processes: list[Any] = []

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kdtrain_ranks_")
        store = os.path.join(self._folder.name, "store")
        self._results = self._context.Queue()
        self._jobs = [self._context.Queue() for _ in range(self.world_size)]
        self._processes = [
            self._context.Process(
                target=_worker,
                args=(r, self.world_size, store, self._jobs[r], self._results, self._env, self._backend),
                daemon=True,
            )
            for r in range(self.world_size)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *, timeout_s: float = TIMEOUT_S, **kwargs: Any) -> list[Any]:
        """Call `function(rank, world_size, **kwargs)` on every rank; the list of its results in rank order.

        Raises AssertionError with every failed rank's traceback, TimeoutError naming the ranks without a result.
        After either, the pool is killed, because its ranks may be at different points. The next call starts a new one.
        """
        if not self._processes:
            self._start()
        path = sys.modules[function.__module__].__file__
        for jobs in self._jobs:
            jobs.put((path, function.__name__, kwargs))
        answers: dict[int, Any] = {}
        failures: list[str] = []
        while len(answers) + len(failures) < self.world_size:
            try:
                # once a rank has failed, the others are probably blocked in a collective: do not wait for them
                rank, value, failure = self._results.get(timeout=5.0 if failures else timeout_s)
            except queue.Empty:
                if failures:
                    break
                self.close(kill=True)
                silent = sorted(set(range(self.world_size)) - set(answers))
                raise TimeoutError(
                    f"{function.__name__}: no result from ranks {silent} within {timeout_s:.0f} s (a deadlock?)"
                ) from None
            if failure is None:
                answers[rank] = value
            else:
                failures.append(f"rank {rank} of {self.world_size}: {failure}")
        if failures:
            self.close(kill=True)
            raise AssertionError("\n".join(failures))
        return [answers[rank] for rank in range(self.world_size)]

    def close(self, *, kill: bool = False) -> None:
        """End the workers and remove their folder."""
        if not self._processes:
            return
        for jobs, process in zip(self._jobs, self._processes, strict=True):
            process.kill() if kill else jobs.put(None)
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
        self._processes = []
        self._folder.cleanup()
