"""Seconds before a run does anything, side by side with another checkout.

    git worktree add /tmp/base COMMIT
    python benchmarks/bench_start.py --base /tmp/base      # -> benchmarks/results/cpu_start.csv, goals.csv

check       `launch/train.py BAD.yaml --check` of a configuration with a misspelt key: until the process has ended
first step  the demo (sh launch/quickstart.sh, configs/demo/distill_cpu.yaml) on two ranks, from the command until the
            first training step begins, which is when the evaluation of step 0 has been printed
one step    the same until the first training step has been printed

Each checkout starts its ranks as its quick start does: by launch/local_ranks.py, or by the deepspeed launcher where it
has no such script. The checkouts take turns, so that a busy machine slows both. The evaluation's and the first step's
numbers must be the same in all runs. Needs the demo's teacher and data (.quickstart, made by the quick start).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring as common
from bench_import import wait_until_quiet, write_goals
from measuring import ROOT

RESULTS, GOALS = ROOT / "benchmarks/results/cpu_start.csv", ROOT / "benchmarks/results/goals.csv"
COLUMNS = ("commit", "date", "device", "versions", "task", "shape", "provider", "median_ms", "p20_ms", "p80_ms")
COLUMNS = (*COLUMNS, "time_ratio", "runs", "load")
"""provider: this or base; time_ratio: of the medians, to the base."""
COMMAND = "python benchmarks/bench_start.py --base BASE"
TASKS = ("check", "first step", "one step")
SHAPES = {
    "check": "BAD.yaml --check",
    "first step": "configs/demo/distill_cpu.yaml, 2 ranks",
    "one step": "configs/demo/distill_cpu.yaml, 2 ranks",
}
CHECK_RUNS, DEMO_RUNS = 15, 5
BAD = "extends: {root}/configs/demo/distill_cpu.yaml\nguard: {{max_skiped_steps: 3}}\n"
EVALUATION = re.compile(r"eval\s+0/\S+\s+(.*?)\s+took ")
FIRST_STEP = re.compile(r"step\s+1/\S+\s+(.*?)\s+lr ")


def environment(root: Path) -> dict[str, str]:
    """What the quick start exports, with the packages of `root`."""
    settings = {
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
        "DS_ACCELERATOR": "cpu",
        "DS_BUILD_OPS": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return os.environ | settings


def check_seconds(root: Path, bad: Path) -> float:
    """Wall seconds of one refused --check. SystemExit if it is not refused."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "launch/train.py", str(bad), "--check"],
        cwd=root,
        env=environment(root),
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode != 2 or "max_skiped_steps is not a setting" not in done.stderr:
        raise SystemExit(f"{root}: --check ended with {done.returncode}\n{done.stderr}")
    return seconds


def ranks_command(root: Path) -> list[str]:
    """What starts two ranks in a checkout."""
    if (root / "launch/local_ranks.py").exists():
        return [sys.executable, "launch/local_ranks.py", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return ["deepspeed", "--num_accelerators", "2", "--master_port", port]


def demo_start(root: Path, quickstart: Path, output: Path) -> dict:
    """Seconds until the first training step begins and until it is printed, and the numbers of both lines."""
    words = [
        *("configs/demo/distill_cpu.yaml", f"run.output_dir={output}", "run.name=start", "log.every_steps=1"),
        *(f"teacher.weights={quickstart}/teacher", f"data.train=[{quickstart}/data/train]"),
        f"data.validation={quickstart}/data/validation",
    ]
    found: dict = {}
    start = time.perf_counter()
    process = subprocess.Popen(
        [*ranks_command(root), "launch/train.py", *words],
        cwd=root,
        env=environment(root),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line)
            for name, pattern in (("first step", EVALUATION), ("one step", FIRST_STEP)):
                if name not in found and (match := pattern.match(line)):
                    found[name] = (time.perf_counter() - start, match[1])
            if "one step" in found:
                break
    finally:
        # all ranks and launchers: they are the session that was started here, and nothing else is in it
        kill_session(process.pid)
        process.wait()
        process.stdout.close()
    if "one step" not in found:
        raise SystemExit(f"{root}: the demo ended before its first step\n{''.join(lines[-25:])}")
    return found


def kill_session(session: int) -> None:
    """End every process of a session; its ranks have process groups of their own."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # a process that has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                os.kill(int(stat.parent.name), signal.SIGKILL)


def measure(
    roots: dict[str, Path], quickstart: Path, folder: Path, *, check_runs: int = CHECK_RUNS, demo_runs: int = DEMO_RUNS
) -> dict[tuple[str, str], list[float]]:
    """(task, provider) -> seconds of every run. SystemExit if the runs' numbers differ."""
    times: dict[tuple[str, str], list[float]] = {(task, name): [] for task in TASKS for name in roots}
    for number in range(check_runs + 1):
        for name, root in roots.items():
            bad = folder / f"bad_{name}.yaml"
            bad.write_text(BAD.format(root=root), encoding="utf-8")
            seconds = check_seconds(root, bad)
            if number:  # the first run may compile Python files
                times["check", name].append(seconds)
    numbers: set[tuple[str, str]] = set()
    for number in range(demo_runs):
        for name, root in roots.items():
            found = demo_start(root, quickstart, folder / f"{name}_{number}")
            numbers.add((found["first step"][1], found["one step"][1]))
            for task in ("first step", "one step"):
                times[task, name].append(found[task][0])
            print(
                f"{name}  first step {found['first step'][0]:.1f} s  one step {found['one step'][0]:.1f} s", flush=True
            )
    if len(numbers) > 1:
        raise SystemExit(f"the runs do not have the same numbers: {sorted(numbers)}")
    return times


def rows_of(times: dict[tuple[str, str], list[float]], commits: dict[str, str], load: float) -> list[dict]:
    """A row per task and checkout; time_ratio on those of this one."""
    packages = " ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    rows = []
    for (task, name), seconds in times.items():
        if not seconds:
            continue
        row = {
            "commit": commits[name],
            "date": common.today(),
            "device": f"{common.cpu_name()}, {len(os.sched_getaffinity(0))} cores",
            "versions": f"python {platform.python_version()} {packages}",
            "task": task,
            "shape": SHAPES[task],
            "provider": name,
            **common.percentiles(seconds),
            "runs": len(seconds),
            "load": f"{load:.2f}",
        }
        base = times.get((task, "base"))
        if name == "this" and base:
            row["time_ratio"] = f"{statistics.median(seconds) / statistics.median(base):.3f}"
        rows.append(row)
    return rows


def goals_of(rows: list[dict]) -> list[dict]:
    """The goals of the issue as rows of goals.csv; the demo's only where it was compared."""
    mine = {row["task"]: row for row in rows if row["provider"] == "this"}
    found = {}
    if "check" in mine:
        found["check_of_bad_file_seconds"] = (f"{float(mine['check']['median_ms']) / 1000:.3g}", "0.25")
    if mine.get("first step", {}).get("time_ratio"):
        found["demo_start_to_first_step_ratio"] = (mine["first step"]["time_ratio"], "0.7")
    return [
        {
            "name": name,
            "measured": measured,
            "goal": goal,
            "better": "lower",
            "commit": rows[0]["commit"],
            "date": rows[0]["date"],
            "command": COMMAND,
        }
        for name, (measured, goal) in found.items()
    ]


def commit_of(root: Path) -> str:
    """Short hash of a checkout; + where its code differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "kdtrain", "kernels", "launch", "benchmarks", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, metavar="PATH", help="the checkout to compare with")
    parser.add_argument("--quickstart", type=Path, default=ROOT / ".quickstart", metavar="PATH")
    parser.add_argument("--busy", action="store_true", help="measure and publish although the machine is busy")
    parser.add_argument("--try", dest="trial", action="store_true", help="one run of each; writes nothing")
    arguments = parser.parse_args()
    quickstart = arguments.quickstart.resolve()
    if not (quickstart / "data/train").is_dir():
        raise SystemExit(f"{quickstart} has no teacher and data; run `sh launch/quickstart.sh` first")
    if not (arguments.busy or arguments.trial):
        wait_until_quiet()
    load, roots = os.getloadavg()[0], {"this": ROOT, "base": arguments.base.resolve()}
    commits = {name: commit_of(root) for name, root in roots.items()}
    runs = {"check_runs": 1, "demo_runs": 1} if arguments.trial else {}
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(measure(roots, quickstart, Path(folder), **runs), commits, load)
    if not arguments.trial:
        common.write_csv(RESULTS, rows, COLUMNS)
        write_goals(GOALS, goals_of(rows))
    for row in rows:
        print(*(row.get(name, "") for name in ("task", "provider", *COLUMNS[7:])), sep="  ")
    for goal in goals_of(rows):
        print(goal["name"], goal["measured"], f"(goal {goal['goal']}, {goal['better']} is better)")


if __name__ == "__main__":
    main()
