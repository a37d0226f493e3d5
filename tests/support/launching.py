"""Scripts of launch/ in processes of their own, with the environment that a launcher gives its ranks.

`start_ranks` forks them from the session's fork server (tests/conftest.py), which has imported torch, DeepSpeed and
transformers already: a process starts in a fraction of a second instead of ten. `run_command` starts a new interpreter,
for what depends on it: the launcher itself, variables that libraries read when they are imported.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtrain.testing.ranks import ENGINE_MODULES

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SETTINGS = {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
}
TIMEOUT_S = 200.0
VOLATILE = ("time/", "throughput/", "memory/")
"""Prefixes of the recorded values that differ between two runs of the same numbers."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: its exit code (negative after a signal) and what it wrote."""

    code: int
    out: str
    err: str


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a launcher's variables, for the CPU and one thread, and `more`."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return {**kept, **SETTINGS, **more}


def free_port() -> int:
    """A TCP port of 127.0.0.1 that the kernel has just found free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher sets for one rank; nothing for a world of one."""
    if ranks == 1:
        return {}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _run_script(script: str, words: list[str], env: dict[str, str], folder: str, file_bytes: int | None) -> None:
    """In the forked process: output to files of `folder`, then the script as the interpreter would run it."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


class Rank:
    """A running process of one script."""

    def __init__(self, script: str, words: Sequence[object], env: dict[str, str], file_bytes: int | None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kdtrain_rank_")
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(ENGINE_MODULES))
        arguments = (str(ROOT / "launch" / script), [str(word) for word in words], env, self._folder.name, file_bytes)
        self._process = context.Process(target=_run_script, args=arguments)
        self._process.start()
        self.pid = int(self._process.pid)

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return None if self._process.exitcode is None else int(self._process.exitcode)

    def output(self, name: str = "out") -> str:
        """What it has written so far to `out` or `err`."""
        path = Path(self._folder.name) / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self._process.kill()

    def end(self, timeout_s: float = TIMEOUT_S) -> Ended:
        """Wait for its end. Raises TimeoutError with what it has written, and kills it."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"no end within {timeout_s:.0f} s\n{self.output()}{self.output('err')}")
        return Ended(int(self._process.exitcode), self.output(), self.output("err"))


def start_rank(
    script: str,
    *words: object,
    rank: int = 0,
    ranks: int = 1,
    port: int = 0,
    env: Mapping[str, str] | None = None,
    file_bytes: int | None = None,
) -> Rank:
    """One rank of launch/`script` with the arguments `words`.

    env: variables to add. file_bytes: no file it writes may become longer (EFBIG).
    """
    return Rank(script, words, environment(**rank_variables(rank, ranks, port), **(env or {})), file_bytes)


def start_ranks(script: str, *words: object, ranks: int = 1) -> list[Rank]:
    """All ranks of launch/`script`, in rank order."""
    port = free_port() if ranks > 1 else 0
    return [start_rank(script, *words, rank=rank, ranks=ranks, port=port) for rank in range(ranks)]


def end_ranks(processes: Sequence[Rank], timeout_s: float = TIMEOUT_S) -> list[Ended]:
    """Wait for all of them; none is left when this returns or raises."""
    try:
        return [process.end(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()


def run_ranks(script: str, *words: object, ranks: int = 1, code: int = 0) -> Ended:
    """Run launch/`script`; how rank 0 ended. Raises AssertionError unless all ranks exit with `code`."""
    ended = end_ranks(start_ranks(script, *words, ranks=ranks))
    assert [end.code for end in ended] == [code] * ranks, "\n".join(end.out + end.err for end in ended)
    return ended[0]


def run_command(
    *command: object, env: Mapping[str, str] | None = None, timeout_s: float = 250, folder: Path | None = None
) -> Ended:
    """A command in a new process. env: variables to add; folder: its current folder, default this process's."""
    words = [str(word) for word in command]
    variables = environment(**(env or {}))
    done = subprocess.run(
        words, capture_output=True, text=True, env=variables, timeout=timeout_s, check=False, cwd=folder
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def deepspeed_command(*words: object, ranks: int = 2) -> list[str]:
    """launch/train.py under the deepspeed launcher."""
    tool = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    return [*tool, "--master_port", str(free_port()), str(ROOT / "launch/train.py"), *map(str, words)]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of RUN/metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def numbers_of(run: Path) -> list[dict[str, Any]]:
    """The records of RUN/metrics.jsonl without times and memory."""
    return [{k: v for k, v in record.items() if not k.startswith(VOLATILE)} for record in read_metrics(run)]


def read_status(run: Path) -> tuple[str, str]:
    """(state, reason up to its first semicolon) of RUN/STATUS."""
    from kdtrain.run_state.run_folder import read_status as read

    found = read(run)
    assert found is not None, f"{run} has no STATUS"
    return found[0], found[1].partition(";")[0]
