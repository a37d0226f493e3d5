"""Kill a training run at random moments, again and again; every resume must reach the same weights, bit for bit.

    python proofs/soak.py               # until 200 kills are done -> docs/results/soak.md
    python proofs/soak.py --kills 50    # fewer
    python proofs/soak.py --behind      # the same with checkpoint.async_write -> docs/results/soak_behind.md

Each round starts launch/train.py in a process of its own on a new run folder: a tiny student with dropout distilled
from a tiny teacher, a checkpoint after every step. It is killed at a moment drawn from a seed, with SIGKILL or
SIGTERM, anywhere between its start and its end, or within milliseconds of the beginning of a checkpoint; then
resumed, and killed again (KILLS_PER_RUN times); then it may end. After every kill the newest checkpoint must read back
with right checksums and be no older than the newest that was complete when the signal was sent. At the end every
reported loss and all weights must equal those of an uninterrupted run.

Results go line by line to soak.jsonl (soak_behind.jsonl) in --work; the same command continues where it stopped.
Processes are forked from a server that has imported the libraries, so that a kill and a resume take seconds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import argparse
import hashlib
import json
import multiprocessing
import random
import runpy
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import measuring as common

TABLES = common.ROOT / "docs/results"
BEHIND = "checkpoint.async_write=true"
STEPS, KILLS_PER_RUN = 16, 2
DONE, STOPPED = 0, 75
TIMEOUT_S = 120
ATTEMPTS = 20


def make_world(folder: Path) -> Path:
    """A token store, a teacher and a student to train; the configuration's path."""
    config = folder / "config.yaml"
    if not config.exists():
        maker = forked(write_world, str(folder))
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"{folder} could not be made: exit code {maker.exitcode}")
    return config


def write_world(name: str) -> None:
    """In a process of its own; the configuration last."""
    from transformers.utils import logging

    from kdtrain.models.tiny import tiny_config
    from tests.support.tiny_run import write_run

    logging.disable_progress_bar()
    folder = Path(name)
    shutil.rmtree(folder, ignore_errors=True)
    write_run(
        folder,
        student=tiny_config("gpt_neox", hidden_dropout=0.2),
        teacher=tiny_config("qwen3"),
        steps=STEPS,
        run={"name": "whole"},
        checkpoint={"keep_last": 2},
    )


def train(config: str, name: str, log: str, *words: str) -> None:
    """In a process of its own: launch/train.py with `words`, its output appended to the file `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    sys.argv = ["train.py", config, f"run.name={name}", *words]
    runpy.run_path(str(common.ROOT / "launch/train.py"), run_name="__main__")


def forked(function: Any, *arguments: str) -> Any:
    """A started process that calls `function`, forked from a server that has imported the libraries."""
    from kdtrain.testing.ranks import ENGINE_MODULES

    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(ENGINE_MODULES))
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


class Trainee:
    """One attempt at a run."""

    def __init__(self, config: Path, name: str, *words: str) -> None:
        self.run = config.parent / "runs" / name
        self.log = config.parent / f"{name}.log"
        self._before = self._hidden()
        self.started = time.monotonic()
        self.process = forked(train, str(config), name, str(self.log), *words)

    def _hidden(self) -> dict[str, int]:
        """Folders that are being written or removed, or were at a kill, with their times of change."""
        found = {}
        for folder in (self.run / "checkpoints").glob(".step_*"):
            with suppress(FileNotFoundError):  # it has just been renamed or removed
                found[folder.name] = folder.stat().st_mtime_ns
        return found

    def unfinished(self) -> list[str]:
        """Names of those that this process, not a former one, has changed."""
        return sorted(name for name, changed in self._hidden().items() if self._before.get(name) != changed)

    def complete(self) -> list[int]:
        """Steps whose checkpoints have their final names."""
        return sorted(int(folder.name[5:]) for folder in (self.run / "checkpoints").glob("step_*"))

    def wait(self) -> int:
        """Exit code, negative after a signal. Raises TimeoutError, and kills it."""
        self.process.join(TIMEOUT_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"{self.run.name} did not end within {TIMEOUT_S} s; see {self.log}")
        return int(self.process.exitcode)


@dataclass(frozen=True, slots=True)
class Plan:
    """When to kill: `delay_s` after the start, or after a checkpoint of a step from `in_save_of` on has begun."""

    signal: int
    delay_s: float
    in_save_of: int | None

    @classmethod
    def draw(cls, number: int, whole_seconds: float) -> Plan:
        """The number-th plan. Half of them aim at a save, every third is SIGTERM."""
        chance = random.Random(number)
        kind = signal.SIGTERM if number % 3 == 2 else signal.SIGKILL
        if number % 4 in (1, 2):
            return cls(kind, chance.uniform(0, 0.02), chance.randrange(1, STEPS))
        return cls(kind, chance.uniform(0, whole_seconds), None)


def kill(trainee: Trainee, plan: Plan) -> bool:
    """Send the signal at the time of the plan; False if the run had ended before."""
    if plan.in_save_of is not None:
        while trainee.process.is_alive() and not any(
            int(name[6:12]) >= plan.in_save_of for name in trainee.unfinished() if name.endswith(".writing")
        ):
            time.sleep(0.0002)
    time.sleep(plan.delay_s)
    if not trainee.process.is_alive():
        return False
    os.kill(trainee.process.pid, plan.signal)
    return True


def last_good(run: Path) -> int:
    """Step of the checkpoint a resume would take, -1 for none, after reading all of it. Raises CheckpointError."""
    from kdtrain.engine import checkpoint

    folder = checkpoint.find_latest(run / "checkpoints")
    if folder is None:
        return -1
    for _ in checkpoint.read_full_parameters(folder):
        pass
    return checkpoint.step_of(folder)


def outcome(run: Path) -> dict[str, Any]:
    """The result of a finished run: every reported loss and norm, and a hash of all weights."""
    from kdtrain.engine import checkpoint
    from kdtrain.telemetry.jsonl_sink import read_records

    folder = checkpoint.find_latest(run / "checkpoints")
    assert folder is not None
    digest = hashlib.sha256()
    for name, weight in checkpoint.read_full_parameters(folder):
        digest.update(name.encode() + weight.numpy().tobytes())
    kept = ("data/step", "data/tokens_seen", "loss/total", "loss/kd", "loss/ce", "optim/grad_norm", "optim/lr")
    records = [[record[key] for key in kept] for record in read_records(run / "metrics.jsonl")]
    return {"step": checkpoint.step_of(folder), "weights": digest.hexdigest(), "records": records}


def run_to_end(config: Path, name: str, *words: str) -> tuple[dict[str, Any], float]:
    """Run or resume to the end; returns the outcome and the seconds it took. SystemExit if it fails."""
    trainee = Trainee(config, name, *words)
    code = trainee.wait()
    if code != DONE:
        raise SystemExit(f"{name} ended with {code}; see {trainee.log}")
    return outcome(trainee.run), time.monotonic() - trainee.started


def one_kill(
    config: Path, name: str, number: int, whole: dict[str, Any], seconds: float, *words: str
) -> dict[str, Any]:
    """Start or resume `name` and kill it according to the number-th plan; returns the record of the kill.

    A run that ends before its kill must have ended as `whole`, and is started again. wrong: the fault, empty if none.
    """
    plan = Plan.draw(number, seconds)
    for _ in range(ATTEMPTS):
        trainee = Trainee(config, name, *words)
        if kill(trainee, plan):
            return {**asdict(plan), "number": number, "name": name, **aftermath(trainee, plan)}
        if trainee.wait() != DONE or outcome(trainee.run) != whole:
            raise SystemExit(f"{name} was to be killed, but ended first, and wrong; see {trainee.log}")
        shutil.rmtree(trainee.run)
        plan = Plan(plan.signal, plan.delay_s / 2, plan.in_save_of and plan.in_save_of // 2)
    raise SystemExit(f"{name}: no kill found its target in {ATTEMPTS} attempts; see {config.parent}")


def aftermath(trainee: Trainee, plan: Plan) -> dict[str, Any]:
    """After the signal: how the process ended, and whether its last good checkpoint can be read."""
    from kdtrain.errors import CheckpointError

    newest = max(trainee.complete(), default=-1)
    after_s = time.monotonic() - trainee.started
    code = trainee.wait()
    found, wrong = -1, ""
    try:
        found = last_good(trainee.run)
        if found < newest:
            wrong = f"step {newest} was complete when the signal was sent, the newest now is {found}"
    except CheckpointError as error:
        wrong = f"the newest checkpoint cannot be read: {str(error).splitlines()[0]}"
    if code not in {-plan.signal, DONE} and not (code == STOPPED and plan.signal == signal.SIGTERM):
        wrong = f"ended with {code}; see {trainee.log}"
    return {"code": code, "after_s": after_s, "left": trainee.unfinished(), "step": found, "wrong": wrong}


def read_log(path: Path) -> list[dict[str, Any]]:
    """Every whole line; one that was cut off by a kill is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def soak(work: Path, kills: int, *, behind: bool = False) -> list[dict[str, Any]]:
    """Kill until `kills` records are in work/soak.jsonl; all of them. A run's records are written when it has ended.

    behind: checkpoints are written in the background, except by the uninterrupted run; other file names.
    """
    log = work / ("soak_behind.jsonl" if behind else "soak.jsonl")
    words = (BEHIND,) if behind else ()
    found = read_log(log)
    if len(found) >= kills:
        return found
    config = make_world(work / "world")
    shutil.rmtree(config.parent / "runs", ignore_errors=True)
    whole, seconds = reference(config)
    commit = common.current_commit()
    while len(found) < kills:
        started, name = time.monotonic(), f"kill_{len(found):04d}"
        some = [one_kill(config, name, len(found) + n, whole, seconds, *words) for n in range(KILLS_PER_RUN)]
        result, _ = run_to_end(config, name, *words)
        for record in some:
            record |= {"same": result == whole, "run_s": time.monotonic() - started, "commit": commit}
        found += some
        common.write_whole(log, "".join(json.dumps(record) + "\n" for record in found))
        if not faults(some):
            shutil.rmtree(config.parent / "runs" / name)
            (config.parent / f"{name}.log").unlink()
        print(*(f"{r['number']}: {when(r)}, {r['wrong'] or 'ok'};" for r in some), flush=True)
    return found


def reference(config: Path) -> tuple[dict[str, Any], float]:
    """Outcome and seconds of an uninterrupted run. SystemExit unless two of them agree."""
    first, _ = run_to_end(config, "whole")
    shutil.rmtree(config.parent / "runs" / "whole")
    whole, seconds = run_to_end(config, "whole")  # the first one includes loading the libraries
    if whole != first or whole["step"] != STEPS or len(whole["records"]) != STEPS:
        raise SystemExit(f"two uninterrupted runs differ, or have no {STEPS} steps; see {config.parent}")
    return whole, seconds


def faults(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in found if record["wrong"] or not record["same"]]


def when(record: dict[str, Any]) -> str:
    """In words, for the table."""
    if record["code"] == STOPPED:
        return "handled: saved after the step and exited with code 75"
    if any(name.endswith(".writing") for name in record["left"]):
        return "inside a save (a partial checkpoint was left)"
    if record["left"]:
        return "inside the removal of an old checkpoint"
    if record["step"] < 0:
        return "before the first checkpoint"
    return "between two saves" if record["code"] != DONE else "at the very end"


def table_of(found: list[dict[str, Any]], *, behind: bool = False) -> str:
    """Markdown: how many kills, where they hit, what was wrong."""
    import deepspeed
    import torch

    bad = faults(found)
    names = {int(signal.SIGKILL): "SIGKILL", int(signal.SIGTERM): "SIGTERM"}
    counts = Counter((when(record), names[record["signal"]]) for record in found)
    aimed = sum(record["in_save_of"] is not None for record in found)
    lines = [
        "# Killed at random moments" + (", checkpoints written in the background" if behind else ""),
        "",
        f"Made by `make soak{' ARGS=--behind' if behind else ''}` (`proofs/soak.py`, which describes what is done and",
        "checked).",
        f"Commit {', '.join(sorted({record['commit'] for record in found}))}, {common.today()}, torch "
        f"{torch.__version__}, deepspeed {deepspeed.__version__}, one process on a CPU.",
        "",
        f"**{len(found)} kills in {len({record['name'] for record in found})} runs, {len(bad)} with a fault.** "
        f"{aimed} were aimed at a checkpoint being written.",
        "After every kill the newest checkpoint was read back with right checksums and none that had been complete was",
        f"lost; every run then reached step {STEPS} with the losses and weights of an uninterrupted run, bit for bit."
        if not bad
        else "The faults are listed below.",
        "",
        "| the kill came | SIGKILL | SIGTERM |",
        "| --- | ---: | ---: |",
    ]
    for moment in sorted({moment for moment, _ in counts}):
        lines.append(f"| {moment} | {counts[moment, 'SIGKILL']} | {counts[moment, 'SIGTERM']} |")
    lines += [f"\nFault: {json.dumps(record)}" for record in bad]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all, those of former calls included")
    parser.add_argument("--work", type=Path, default=common.ROOT / ".soak", help="where runs and soak.jsonl are kept")
    parser.add_argument("--behind", action="store_true", help="with checkpoint.async_write")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    found = soak(arguments.work.resolve(), arguments.kills, behind=arguments.behind)
    text = table_of(found, behind=arguments.behind)
    common.write_whole(TABLES / ("soak_behind.md" if arguments.behind else "soak.md"), text)
    print(text, end="")
    return int(bool(faults(found)))


if __name__ == "__main__":
    sys.exit(main())
