"""Shared by the benchmarks: rows of a CSV, percentiles, memory of a process, provenance, atomic files."""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kdtrain.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    *("commit", "date", "device", "versions", "task", "shape", "provider", "mode"),
    *("median_ms", "p20_ms", "p80_ms", "time_ratio", "peak_bytes", "peak_ratio", "gradient_error", "absent"),
)
"""time_ratio, peak_ratio: to `naive` of the same task, shape and mode. absent: why there are no numbers."""

MIN_RUNS, MAX_RUNS, RUN_SECONDS = 3, 15, 2.0
MEASURED = (
    "kdtrain/losses",
    "kdtrain/models",
    "kdtrain/teacher",
    "kdtrain/distributed",
    "kdtrain/data",
    "kdtrain/stores",
    "kdtrain/batch.py",
    "kdtrain/documents.py",
    "kernels",
    "benchmarks",
)


def percentiles(seconds: Sequence[float]) -> dict[str, str]:
    """Median, 20th and 80th percentile in ms, as a CSV has them."""
    times = sorted(1000 * second for second in seconds)
    last = len(times) - 1
    return {
        "median_ms": f"{statistics.median(times):.4g}",
        "p20_ms": f"{times[round(0.2 * last)]:.4g}",
        "p80_ms": f"{times[round(0.8 * last)]:.4g}",
    }


def with_ratios(rows: list[dict]) -> list[dict]:
    """Fill time_ratio and peak_ratio from the naive rows."""
    naive = {key_of(row): row for row in rows if row["provider"] == "naive" and not row["absent"]}
    for row in rows:
        base = naive.get(key_of(row))
        if base is None or row["absent"]:
            continue
        for ratio, column in (("time_ratio", "median_ms"), ("peak_ratio", "peak_bytes")):
            row[ratio] = f"{float(row[column]) / float(base[column]):.3f}"
    return rows


def key_of(row: dict) -> tuple[str, str, str]:
    """The key that rows must share to be compared."""
    return row["task"], row["shape"], row["mode"]


def memory(field: str) -> int:
    """Bytes of a kB field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark measures memory on Linux only")


def reset_peak() -> int:
    """Reset the process's high-water mark after returning freed memory (glibc); returns the current use in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def peak_and_times(run: Callable[[], object]) -> dict[str, Any]:
    """peak_bytes: growth of resident memory during one call. times: seconds of the MIN_RUNS to MAX_RUNS after it."""
    before = reset_peak()
    run()
    peak = memory("VmHWM") - before
    times: list[float] = []
    while len(times) < MIN_RUNS or (len(times) < MAX_RUNS and sum(times) < RUN_SECONDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {"times": times, "peak_bytes": peak}


def cpu_name() -> str:
    """As the kernel reports it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def current_commit() -> str:
    """Short hash, with a + if measured code differs from it.

    Without git, or outside a checkout: the environment's KDTRAIN_COMMIT, else unknown.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:  # not installed
            return ""

    changed = git("status", "--porcelain", "--", *MEASURED, ":!benchmarks/results")
    known = git("rev-parse", "--short", "HEAD") or os.environ.get("KDTRAIN_COMMIT") or "unknown"
    return known + ("+" if changed else "")


def today() -> str:
    """UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def in_fresh_process(script: str, job: dict, **environment: str) -> dict:
    """`script --one JOB` in a process of its own with all cores; its last line as JSON. Raises if it fails."""
    command = [sys.executable, script, "--one", json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), **environment}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def write_csv(path: Path, rows: Iterable[dict], columns: Sequence[str] = COLUMNS) -> None:
    """Write a CSV atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def read_csv(path: Path, command: str) -> list[dict]:
    """Rows of a CSV; SystemExit names the command that makes it if it does not exist."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist; run `{command}` first")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)


def markdown_rows(rows: Iterable[dict], errors: Sequence[str] = ("gradient_error",)) -> list[str]:
    """Header and one line per row: time and memory, their ratio to naive, the columns `errors`; absences by name."""
    more = "".join(f" {name.replace('_', ' ')} |" for name in errors)
    lines = [
        f"| task | shape | mode | provider | median ms | p20 - p80 | of naive | peak MiB | of naive |{more}",
        f"| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |{' ---: |' * len(errors)}",
    ]
    for row in rows:
        head = f"| {row['task']} | {row['shape']} | {row['mode']} | {row['provider']} "
        if row["absent"]:
            lines.append(f"{head}| absent: {row['absent']} |{' |' * (4 + len(errors))}")
            continue
        lines.append(
            f"{head}| {float(row['median_ms']):.4g} | {float(row['p20_ms']):.4g} - {float(row['p80_ms']):.4g} "
            f"| {row['time_ratio']} | {int(row['peak_bytes']) / 2**20:.0f} | {row['peak_ratio']} "
            f"|{''.join(f' {row[name]} |' for name in errors)}"
        )
    return lines


def measure_or_tabulate(
    description: str | None,
    results: Path,
    table: Path,
    *,
    one: Callable[[dict], dict],
    run_all: Callable[[], None],
    table_of: Callable[[list[dict]], str],
) -> None:
    """The command line of a script whose jobs each get a process: `run_all`, `one` job, or `results` as `table`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table from the CSV instead of measuring")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(json.loads(arguments.one))))
    elif arguments.table:
        text = table_of(read_csv(results, f"python benchmarks/{Path(sys.argv[0]).name}"))
        write_whole(table, text)
        print(text, end="")
    else:
        run_all()
