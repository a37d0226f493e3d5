"""The streamed losses of two checkouts, side by side: `python benchmarks/bench_loss_head.py --base PATH`.

Each checkout has a process (loss_server.py) with its own packages and its own benchmarks/loss_providers.py. The
processes take turns, one run each, so that a busy machine slows both. Runs before the first timed ones, for WARM_S
seconds, fill caches and allocators; on a virtual machine they also make the host back the pages that are used.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measuring as common
from bench_start import commit_of
from measuring import ROOT

RESULTS, GOALS = ROOT / "benchmarks/results/cpu_loss_pair.csv", ROOT / "benchmarks/results/goals.csv"
COMMAND = "python benchmarks/bench_loss_head.py --base BASE"
COLUMNS = ("commit", "date", "device", "versions", "task", "shape", "provider", "median_ms", "p20_ms", "p80_ms")
COLUMNS = (*COLUMNS, "time_ratio", "runs", "load")
"""provider: this or base; time_ratio: of the medians, to the base."""
SHAPES = [("kl_ce", tokens, vocab) for tokens in (256, 512) for vocab in (8192, 32768, 50257)]
SHAPES += [(task, 512, 50257) for task in ("kl", "jsd", "ce")]
SHAPES += [("kl_ce", tokens, 50257) for tokens in (1024, 4096)]
RUNS, WARM_S = 15, 4.0


def server(root: Path, shape: tuple[str, int, int]) -> subprocess.Popen[bytes]:
    """A process that serves a checkout, over unbuffered pipes."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("loss_server.py")), str(root), *map(str, shape)],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())},
    )


def seconds_of(process: subprocess.Popen[bytes]) -> float:
    """One run. SystemExit if the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(b"run\n")
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args}: ended with {process.wait()}")
    return float(line)


def paired_times(roots: dict[str, Path], shape: tuple[str, int, int], runs: int) -> dict[str, list[float]]:
    """Checkout -> seconds of its runs, which alternate with the other's."""
    with ExitStack() as open_processes:
        servers = {name: open_processes.enter_context(server(root, shape)) for name, root in roots.items()}
        end = time.monotonic() + (WARM_S if runs > 1 else 0.0)
        while time.monotonic() < end:
            for process in servers.values():
                seconds_of(process)
        found = [{name: seconds_of(process) for name, process in servers.items()} for _ in range(runs)]
        for process in servers.values():
            assert process.stdin is not None
            process.stdin.close()
    return {name: [times[name] for times in found] for name in roots}


def rows_of(shape: tuple[str, int, int], times: dict[str, list[float]], same: dict[str, Any]) -> list[dict]:
    """A row per checkout; time_ratio on that of this one."""
    ratio = statistics.median(times["this"]) / statistics.median(times["base"])
    return [
        {
            **same,
            "commit": same["commit"][name],
            "task": shape[0],
            "shape": f"T={shape[1]} V={shape[2]}",
            "provider": name,
            **common.percentiles(seconds),
            "time_ratio": f"{ratio:.3f}" if name == "this" else "",
            "runs": len(seconds),
        }
        for name, seconds in times.items()
    ]


def tokens_of(row: dict) -> int:
    return int(row["shape"].split()[0].removeprefix("T="))


def goal_of(rows: list[dict]) -> dict:
    """The goal as a row of goals.csv: the largest of the ratios below 1,024 tokens."""
    mine = [row for row in rows if row["provider"] == "this" and tokens_of(row) < 1024]
    return {
        "name": "streamed_loss_time_ratio_below_1024",
        "measured": max((row["time_ratio"] for row in mine), key=float),
        "goal": "0.9",
        "better": "lower",
        "commit": mine[0]["commit"],
        "date": mine[0]["date"],
        "command": COMMAND,
    }


def compare(base: Path, shapes: list[tuple[str, int, int]], runs: int = RUNS) -> list[dict]:
    """Measure and print all shapes: two rows of each."""
    roots = {"this": ROOT, "base": base.resolve()}
    same = {
        "commit": {name: commit_of(root) for name, root in roots.items()},
        "date": common.today(),
        "device": f"{common.cpu_name()}, {os.cpu_count()} threads",
        "versions": f"python {platform.python_version()} torch {version('torch')}",
        "load": f"{os.getloadavg()[0]:.2f}",
    }
    rows = []
    for shape in shapes:
        rows += rows_of(shape, paired_times(roots, shape, runs), same)
        for row in rows[-2:]:
            print(*(row[name] for name in COLUMNS[4:11]), sep="  ", flush=True)
    return rows
