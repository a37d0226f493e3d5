"""Time of the default tests before and of the fast tier now, one after the other on one quiet machine.

    python benchmarks/bench_tests.py --base PATH                    # -> benchmarks/results/{cpu_tests,goals}.csv
    python benchmarks/bench_tests.py --base PATH --ci-seconds 1320  # and a goal for a whole run of .ci/run
    python benchmarks/bench_tests.py --base PATH --try "-k layout"  # passes the arguments to both; writes nothing

PATH: a checkout of the commit to compare with, whose default tests run as its README's command ran them, `python -m
pytest` in one process. This tree's fast tier runs as launch/quickstart.sh runs it. Both use this interpreter, and one
thread per process. The script waits until the machine is quiet (load of at most 0.5) and refuses to start if it is not
within five minutes; --busy measures all the same. A row has the seconds of a whole command, collection included, the
numbers of its tests, and the load before it. Tests that fail end the script.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring as common
from bench_import import wait_until_quiet, write_goals
from measuring import ROOT

RESULTS, GOALS = ROOT / "benchmarks/results/cpu_tests.csv", ROOT / "benchmarks/results/goals.csv"
COLUMNS = ("commit", "date", "device", "versions", "tests", "seconds", "passed", "skipped", "load")
COMMAND = "python benchmarks/bench_tests.py --base PATH"
WORKERS = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
MAX_RATIO, MAX_CI_S = 0.5, 25 * 60


def summary_of(output: str) -> tuple[int, int]:
    """(passed, skipped) of pytest's last line. Raises ValueError where tests failed or there is no such line."""
    last = next((line for line in reversed(output.splitlines()) if re.search(r" in \d+\.\d+s", line)), "")
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped|failed|error)", last)}
    if not found.get("passed") or found.get("failed") or found.get("error"):
        raise ValueError(f"the tests did not pass: {last or output[-2000:]}")
    return found["passed"], found.get("skipped", 0)


def commit_of(tree: Path) -> str:
    """Short hash of a checkout's commit."""
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_tests(tree: Path, name: str, *words: str) -> dict:
    """One row: pytest with `words` in a checkout."""
    env = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}", "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    load, started = os.getloadavg()[0], time.monotonic()
    command = [sys.executable, "-m", "pytest", *words]
    done = subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - started
    passed, skipped = summary_of(done.stdout)
    versions = "python {}.{}.{}".format(*sys.version_info[:3])
    device = f"{common.cpu_name()}, {os.cpu_count()} cores"
    row = {"commit": commit_of(tree), "date": common.today(), "device": device, "versions": versions, "tests": name}
    return {**row, "seconds": f"{seconds:.1f}", "passed": passed, "skipped": skipped, "load": f"{load:.2f}"}


def goals_of(rows: list[dict], ci_seconds: float | None) -> list[dict]:
    """Fast tier to default tests before; whole .ci/run, if its seconds are given. Rows of goals.csv."""
    before, now = (float(row["seconds"]) for row in rows)
    found = [{"name": "fast_tests_time_ratio", "measured": f"{now / before:.3f}", "goal": f"{MAX_RATIO:g}"}]
    if ci_seconds is not None:
        found.append({"name": "ci_run_seconds", "measured": f"{ci_seconds:.0f}", "goal": str(MAX_CI_S)})
    about = {"better": "lower", "commit": rows[1]["commit"], "date": rows[1]["date"]}
    commands = {"fast_tests_time_ratio": COMMAND, "ci_run_seconds": "bash .ci/run"}
    return [{**goal, **about, "command": commands[goal["name"]]} for goal in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a checkout of the commit to compare with")
    parser.add_argument("--ci-seconds", type=float, help="of a whole run of .ci/run on the same machine")
    parser.add_argument("--try", dest="words", help="more arguments for pytest; nothing is written")
    parser.add_argument("--busy", action="store_true", help="measure on a machine that is not quiet")
    arguments = parser.parse_args()
    more = arguments.words.split() if arguments.words else []
    rows = []
    trees = ((arguments.base.resolve(), "default tests of before", ()), (ROOT, "fast tier", WORKERS))
    for tree, name, words in trees:
        if not arguments.busy:
            wait_until_quiet()
        rows.append(run_tests(tree, name, *words, *more))
        print(rows[-1], flush=True)
    goals = goals_of(rows, arguments.ci_seconds)
    if not more:
        common.write_csv(RESULTS, rows, COLUMNS)
        write_goals(GOALS, goals)
    for goal in goals:
        print(f"{goal['name']}: {goal['measured']} (goal: at most {goal['goal']})")


if __name__ == "__main__":
    main()
