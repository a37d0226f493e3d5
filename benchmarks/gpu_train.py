"""Whole tiny runs under DeepSpeed on one GPU, each against the same run on the CPU.

    python benchmarks/gpu_train.py [RUN ...] [--out FOLDER] [--cpu] [--budget SECONDS] [--jobs N]
    python benchmarks/gpu_train.py --list         # the runs and their settings
    python benchmarks/gpu_train.py --wheels       # how to bring deepspeed to a machine without a network

Every run is launch/train.py: six steps, a checkpoint after each, losses and gradient norms compared step by step. The
reference is the run of the same models on the CPU at ZeRO stage 1; runs in bfloat16 may differ by 5e-2 from it, runs in
float32 by 1e-4 (kernels of attention and reductions add up in another order, so equal bits cannot be expected).
peak_bytes: what torch's allocator held at most, beside estimate_bytes of `kdtrain.planning.estimate`; of models this
small the workspaces of libraries are most of it. Runs share the device, --jobs at a time: `seconds` measures no speed.
--cpu: the same runs on the CPU. A row per run in OUT/gpu_train.csv, the output of those that failed in
OUT/gpu_train.log; exits with 1 unless every run is ok. A run that does not fit into --budget is not started, and its
row states that.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring as common
from gpu_common import Setting, attempt
from gpu_train_runs import REFERENCES, RUNS, STEPS, Run, write_models

KEYS = ("loss/total", "loss/kd", "loss/ce", "optim/grad_norm")
RUN_SECONDS, BUDGET, LOG_LINES = 90, 205, 40
NEEDED = (
    *("deepspeed", "einops", "hjson", "msgpack", "ninja", "psutil", "py-cpuinfo"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    *("omegaconf", "rich", "markdown-it-py", "mdurl", "Pygments"),
)
"""Distributions that launch/train.py imports besides torch, transformers and their dependencies."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a launch. problem: empty if it succeeded."""

    seconds: float
    problem: str = ""
    output: str = ""


@dataclass(frozen=True, slots=True)
class Bench:
    """The folder of the runs and how they are launched. deadline: in time.monotonic()."""

    folder: Path
    is_cpu: bool
    deadline: float

    def launch(self, run: Run, name: str, *, on_cpu: bool) -> Outcome:
        """Launch `run` from start to end; if it is a resumed run, half of its steps first."""
        began = time.monotonic()
        for tokens in run.stops():
            left = min(RUN_SECONDS, self.deadline - time.monotonic())
            if left < 5:
                return Outcome(time.monotonic() - began, "not started: the time budget is spent")
            outcome = self._launch_once([*run.settings, f"run.name={name}", *tokens], run.models, left, on_cpu)
            if outcome.problem:
                return Outcome(time.monotonic() - began, outcome.problem, outcome.output)
        return Outcome(time.monotonic() - began)

    def _launch_once(self, settings: list[str], models: str, limit: float, on_cpu: bool) -> Outcome:
        paths = [str(common.ROOT), str(common.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("DS_ACCELERATOR", None)
        if on_cpu or self.is_cpu:
            environment["DS_ACCELERATOR"] = "cpu"
        script, config = common.ROOT / "launch/train.py", self.folder / models / "config.yaml"
        command = [sys.executable, str(script), str(config), "schedule.shape=constant", *settings]
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                env=environment,
                timeout=limit,
            )
        except subprocess.TimeoutExpired as expired:
            output: Any = expired.output or b""  # bytes: the output need not be valid text
            output = output.decode(errors="replace") if isinstance(output, bytes) else output
            return Outcome(limit, f"did not end within {limit:.0f} s", output)
        return Outcome(0.0, "" if done.returncode == 0 else f"ended with {done.returncode}", done.stdout)

    def records(self, models: str, name: str) -> list[dict[str, float]]:
        """metrics.jsonl of a run."""
        path = self.folder / models / "runs" / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def worst_difference(got: list[dict[str, float]], want: list[dict[str, float]]) -> float:
    """Of the values of KEYS, over all steps, relative to the reference; nan if one is, or if steps are missing."""
    if len(got) != len(want) or not got:
        return float("nan")
    found = [abs(one[key] / other[key] - 1) for one, other in zip(got, want, strict=True) for key in KEYS]
    return float("nan") if any(value != value for value in found) else max(found)


def rows(setting: Setting, bench: Bench, runs: list[Run], jobs: int) -> Iterator[dict]:
    """A row per run, in order, as they end."""
    names = dict.fromkeys(run.reference for run in runs)
    with ThreadPoolExecutor(jobs) as pool:
        references = {
            name: pool.submit(bench.launch, REFERENCES[name], f"reference_{name}", on_cpu=True) for name in names
        }
        started = [(run, pool.submit(bench.launch, run, run.name, on_cpu=False)) for run in runs]
        for run, future in started:
            yield row_of(setting, bench, run, future.result(), references[run.reference].result())


def row_of(setting: Setting, bench: Bench, run: Run, outcome: Outcome, reference: Outcome) -> dict:
    """Steps, worst difference and memory of a successful run, else the reason of its failure."""
    row = {"name": run.name, "settings": " ".join(run.settings), "steps": 0, "worst": "", "tolerance": run.tolerance}
    row |= {"verdict": "FAIL", "seconds": f"{outcome.seconds:.1f}"}
    row |= dict.fromkeys(("peak_bytes", "estimate_bytes", "packages", "note"), "")
    for what, found in ((run.name, outcome), (f"reference {run.reference}", reference)):
        if found.problem:
            log_failure(setting, what, found)
            return shown(row | {"note": f"{what} {found.problem}"})
    compared, reason = attempt(lambda: compare(bench, run))
    return shown(row | (compared if compared is not None else {"note": reason}))


def compare(bench: Bench, run: Run) -> dict[str, Any]:
    """The columns that need the metrics of both runs."""
    got = bench.records(run.models, run.name)
    worst = worst_difference(got, bench.records(run.models, f"reference_{run.reference}"))
    peaks = [record["memory/peak_allocated_gib"] for record in got if "memory/peak_allocated_gib" in record]
    estimate, reason = attempt(lambda: estimated_bytes(bench, run))  # the verdict does not depend on the estimate
    return {
        "steps": len(got),
        "worst": f"{worst:.2g}",
        "verdict": "ok" if worst <= run.tolerance and len(got) == STEPS else "FAIL",
        "peak_bytes": round(max(peaks) * 2**30) if peaks else "",
        "estimate_bytes": "" if estimate is None else estimate,
        "packages": " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("deepspeed", "transformers")),
        "note": f"no estimate: {reason}" if reason else "",
    }


def estimated_bytes(bench: Bench, run: Run) -> int:
    """The device's bytes that `--check` would print for this run, with packed where attention is auto."""
    from kdtrain.config.load import load_run
    from kdtrain.jobs.build.models import model_specs
    from kdtrain.jobs.header import estimate_of_run
    from kdtrain.jobs.inputs import open_inputs

    words = [str(bench.folder / run.models / "config.yaml"), f"run.name={run.name}", *run.settings]
    cfg = load_run(words).config
    wanted = (cfg.student.attention, cfg.teacher.attention)
    attention = tuple("packed" if name == "auto" else name for name in wanted)
    inputs = open_inputs(cfg, model_specs(cfg))
    return estimate_of_run(cfg, inputs, 1, attention=attention, on_cuda=not bench.is_cpu).total


def shown(row: dict) -> dict:
    print(row["verdict"].ljust(4), row["name"], f"{row['steps']} steps, off by {row['worst'] or '-'}", end=" ")
    print(f"/ {row['tolerance']:g}, {row['seconds']} s", row["note"], flush=True)
    return row


def log_failure(setting: Setting, what: str, outcome: Outcome) -> None:
    """Append the last lines of its output to the log."""
    tail = "\n".join(outcome.output.splitlines()[-LOG_LINES:])
    with (setting.out / f"{setting.prefix}_train.log").open("a", encoding="utf-8") as file:
        file.write(f"=== {what}: {outcome.problem}\n{tail}\n")
    print(tail, file=sys.stderr, flush=True)


def missing() -> list[str]:
    """Those of NEEDED that are not installed."""
    return [name for name in NEEDED if not any(True for _ in importlib.metadata.distributions(name=name))]


def wheels(names: list[str]) -> str:
    """Commands that install these distributions, in the pinned versions, on a machine without a network."""
    pins = dict(
        line.split("==")
        for line in (common.ROOT / "constraints-gpu.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    pinned = {name: next(pin for pin in pins if pin.lower().replace("_", "-") == name.lower()) for name in names}
    specs = [f"{name}=={pins[pinned[name]]}" for name in names]
    others = " ".join(spec for spec in specs if not spec.startswith("deepspeed"))
    target = "--only-binary=:all: --python-version 3.12 --implementation cp " + " ".join(
        f"--platform {name}_x86_64" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
    )
    lines = [
        "# where there is a network (3.12: the Python of the GPU machine; deepspeed comes as source only):",
        *([f"python3 -m pip download --no-deps -d wheels {target} {others}"] if others else []),
        *(f"DS_BUILD_OPS=0 python3 -m pip wheel --no-deps -w wheels {s}" for s in specs if s.startswith("deepspeed")),
        "# on the GPU machine, beside the folder wheels:",
        "python3 -m pip install --no-index --no-deps --target site wheels/*.whl"
        " && export PYTHONPATH=$PWD/site${PYTHONPATH:+:$PYTHONPATH}",
    ]
    return "\n".join(lines)


def absent_rows(runs: list[Run], names: list[str]) -> Iterator[dict]:
    """The rows where deepspeed is not installed."""
    for run in runs:
        yield {
            "name": run.name,
            "settings": " ".join(run.settings),
            "steps": 0,
            "tolerance": run.tolerance,
            "verdict": "absent",
            "note": f"not installed: {' '.join(names)}",
        }


def main() -> None:
    began = time.monotonic()
    parser = Setting.parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="default: all of --list")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--wheels", action="store_true")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all runs together")
    parser.add_argument("--jobs", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)), help="runs at a time")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{run.name}: {run.models}, {' '.join(run.settings)}" for run in RUNS))
        return
    if arguments.wheels:
        print(wheels(list(NEEDED)))
        return
    if unknown := set(arguments.runs) - {run.name for run in RUNS}:
        parser.error(f"no run {', '.join(sorted(unknown))}; see --list")
    chosen = [run for run in RUNS if not arguments.runs or run.name in arguments.runs]
    setting = Setting.of(arguments)
    if names := missing():
        setting.write("train", absent_rows(chosen, names))
        raise SystemExit(f"not installed: {' '.join(names)}\n{wheels(names)}")
    setting.out.mkdir(parents=True, exist_ok=True)
    (setting.out / f"{setting.prefix}_train.log").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_train_") as folder:
        write_models(Path(folder), {run.models for run in chosen})
        bench = Bench(Path(folder), setting.is_cpu, began + arguments.budget)
        found = setting.write("train", rows(setting, bench, chosen, arguments.jobs))
    failed = [row["name"] for row in found if row["verdict"] != "ok"]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(found)} runs failed: {' '.join(failed)}")


if __name__ == "__main__":
    main()
