"""The loss-head benchmark: its table is what its CSV says, and one small measurement of every provider agrees."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/bench_loss_head.py"


def load():
    spec = importlib.util.spec_from_file_location("bench_loss_head", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_published_table_is_made_from_the_published_measurements():
    bench = load()
    with bench.RESULTS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [(row["shape"], row["provider"], row["mode"]) for row in rows]
    assert measured == [(bench.shape_of(job), job["provider"], job["mode"]) for job in bench.jobs()]
    assert bench.TABLE.read_text(encoding="utf-8") == bench.table_of(rows)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_one_measurement_times_the_loss_and_sees_its_memory():
    bench = load()
    job = {"tokens": 64, "vocab": 4096, "provider": bench.MAIN, "mode": "train"}
    command = [sys.executable, str(SCRIPT), "--one", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["times"]) >= bench.MIN_RUNS
    assert all(seconds > 0 for seconds in answer["times"])
    assert len(answer["checks"]) == 3
    head_gradient = 4 * 4096 * bench.WIDTH_S
    assert head_gradient <= answer["peak_bytes"] <= 64 * head_gradient
