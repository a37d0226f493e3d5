"""A whole training step side by side with another checkout's: what a change of the code costs.

    git worktree add /tmp/base COMMIT
    python benchmarks/bench_step_paired.py --base /tmp/base     # -> benchmarks/results/cpu_step_paired.csv, goals.csv

Jobs and modes are those of bench_step.py, the small ones: distill is the whole step, lm the same with cross-entropy
alone. Each checkout runs its own code, by its own `bench_step.py --one`, in fresh processes; the checkouts take turns,
the first one changing with every round, so that load on the machine affects both alike. One row per job, mode and
checkout: seconds of the steps of all rounds; ratio: median over rounds of this checkout's median step to the base's;
ratio_fastest: of the fastest steps, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_step
import measuring as common
from bench_import import wait_until_quiet, write_goals
from bench_start import commit_of
from measuring import ROOT

RESULTS, GOALS = ROOT / "benchmarks/results/cpu_step_paired.csv", ROOT / "benchmarks/results/goals.csv"
COLUMNS = ("commit", "date", "device", "versions", "shape", "layout", "mode", "provider", "median_ms", "p20_ms")
COLUMNS = (*COLUMNS, "p80_ms", "fastest_ms", "ratio", "ratio_fastest", "runs", "load")
"""provider: this or base; ratios: on the rows of this."""
COMMAND = "python benchmarks/bench_step_paired.py --base BASE"
MODES = ("distill", "lm")
ROUNDS = 3
Rounds = dict[tuple[str, str], list[list[float]]]
"""(mode, provider) -> for each round the seconds of its steps."""


def jobs() -> list[dict]:
    """A student with a teacher of four times its size, on one rank and on two."""
    return [
        {**job, "rounds": 4} for job in bench_step.jobs("cpu") if job["teacher"] == "llama-20m" and job["zero"] == 1
    ]


def measure(job: dict, roots: dict[str, Path], rounds: int) -> Rounds:
    """Seconds of the steps of both checkouts."""
    found: Rounds = {(mode, name): [] for mode in MODES for name in roots}
    for number in range(rounds):
        for name in list(roots) if number % 2 == 0 else list(roots)[::-1]:
            root = roots[name]
            paths = f"{root}{os.pathsep}{root / 'kernels'}"
            answer = bench_step.run_job(job, str(root / "benchmarks/bench_step.py"), PYTHONPATH=paths)
            for mode in MODES:
                found[mode, name].append(answer["seconds"][mode])
            medians = "  ".join(f"{mode} {1000 * statistics.median(answer['seconds'][mode]):.1f} ms" for mode in MODES)
            print(f"{bench_step.layout_of(job)}  {name}  {medians}", flush=True)
    return found


def rows_of(job: dict, found: Rounds, commits: dict[str, str], load: float) -> list[dict]:
    """A row per mode and checkout."""
    rows = []
    for (mode, name), rounds in found.items():
        seconds = [second for one in rounds for second in one]
        row = {
            "commit": commits[name],
            "date": common.today(),
            "device": f"{common.cpu_name()}, {job['ranks']} x {job['threads']} threads",
            "versions": bench_step.versions(),
            "shape": bench_step.shape_of(job),
            "layout": bench_step.layout_of(job),
            "mode": mode,
            "provider": name,
            **common.percentiles(seconds),
            "fastest_ms": f"{1000 * min(seconds):.4g}",
            "runs": len(seconds),
            "load": f"{load:.2f}",
        }
        if name == "this":
            base = found[mode, "base"]
            ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(rounds, base, strict=True)]
            row["ratio"] = f"{statistics.median(ratios):.3f}"
            row["ratio_fastest"] = f"{min(seconds) / min(second for one in base for second in one):.3f}"
        rows.append(row)
    return rows


def goal_of(rows: list[dict]) -> dict:
    """The goal as a row of goals.csv: the slowest of all jobs and modes."""
    mine = [row for row in rows if row["provider"] == "this"]
    return {
        "name": "whole_step_time_ratio",
        "measured": f"{max(float(row['ratio']) for row in mine):.3f}",
        "goal": "1.03",
        "better": "lower",
        "commit": mine[0]["commit"],
        "date": mine[0]["date"],
        "command": COMMAND,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, metavar="PATH", help="the checkout to compare with")
    parser.add_argument("--busy", action="store_true", help="measure and publish although the machine is busy")
    parser.add_argument("--try", dest="trial", action="store_true", help="one round of each; writes nothing")
    arguments = parser.parse_args()
    if not (arguments.busy or arguments.trial):
        wait_until_quiet()
    load, roots = os.getloadavg()[0], {"this": ROOT, "base": arguments.base.resolve()}
    commits, rows = {name: commit_of(root) for name, root in roots.items()}, []
    for job in jobs():
        rows += rows_of(job, measure(job, roots, 1 if arguments.trial else ROUNDS), commits, load)
    if not arguments.trial:
        common.write_csv(RESULTS, rows, COLUMNS)
        write_goals(GOALS, [goal_of(rows)])
    for row in rows:
        print(*(row.get(name, "") for name in COLUMNS[4:]), sep="  ")
    print("whole_step_time_ratio", goal_of(rows)["measured"], "(goal 1.03, lower is better)")


if __name__ == "__main__":
    main()
