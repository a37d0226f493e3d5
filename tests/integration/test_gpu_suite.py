"""The first group of the GPU suite on the CPU: the probe, and whole runs against their reference."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]


@pytest.mark.timeout(580)
def test_gpu_probe_and_two_runs_pass_on_the_cpu(tmp_path):
    names = {"PYTHON": sys.executable, "ARGS": "--cpu", "RUNS": "zero2_overlap_async resumed", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sh", str(ROOT / "benchmarks/gpu_suite.sh"), "gpu-1", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
        env={**os.environ, **names},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "gpu-1.txt").read_text(encoding="utf-8").splitlines()[1:]
    stages = ("products", "streams", "snapshot", "packed", "inplace", "train")
    assert [line.split()[:2] for line in table] == [[stage, "ok"] for stage in stages]
    with (tmp_path / "dry_train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["steps"], row["verdict"]) for row in rows] == [
        ("zero2_overlap_async", "6", "ok"),
        ("resumed", "6", "ok"),
    ]
    assert all(int(row["estimate_bytes"]) > 0 and float(row["worst"]) <= 1e-6 for row in rows)
    with (tmp_path / "dry_probe.csv").open(encoding="utf-8", newline="") as file:
        assert {row["name"].split()[0] for row in csv.DictReader(file)} == set(stages[:-1])
