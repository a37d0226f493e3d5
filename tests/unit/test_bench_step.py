"""The whole-step benchmark: phases add up to steps, rows are what was measured, the table is made from the CSV."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    return import_module("bench_step")


def toy(folder):
    from kdtrain.models.tiny import tiny_config

    job = {"vocab": 300, "seq_len": 16, "sequences": 4, "micro": 2, "dtype": "float32", "ranks": 1, "tp": 1, "zero": 1}
    for role, name in (("student", "smollm"), ("teacher", "qwen3")):
        path = folder / f"{role}.json"
        path.write_text(json.dumps(tiny_config(name)))
        job[role] = str(path)
    return {**job, "rounds": 2, "steps": 3, "slab_bytes": 1 << 14, "device": "cpu", "threads": 1}


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_toy_run_measures_three_modes_whose_phases_add_up(bench, tmp_path):
    job = toy(tmp_path)
    answer = bench.run_job(job)
    assert {mode: len(seconds) for mode, seconds in answer["seconds"].items()} == dict.fromkeys(bench.MODES, 2)
    for mode in ("distill", "lm"):
        phases, seconds = answer["phases"][mode], answer["seconds"][mode]
        assert sum(phases.values()) == pytest.approx(sum(seconds) / len(seconds))
        assert all(phases[name] > 0 for name in phases if (mode, name) != ("lm", "teacher"))
    assert answer["phases"]["lm"]["teacher"] == 0
    assert answer["peak_bytes"] > answer["parts"]["weights"] + answer["parts"]["teacher"] > 0
    rows = bench.rows_of(job, answer, "abc")
    assert [row["mode"] for row in rows] == list(bench.MODES)
    assert rows[0]["shape"] == "student from teacher, V=300, 64 tokens = 4 x 16"


def test_nested_phases_are_made_disjoint():
    found = import_module("step_rank").split(
        {"data_wait": 1.0, "forward": 10.0, "teacher": 4.0, "head": 3.0, "backward": 5.0, "optimizer": 2.0}, 20.0
    )
    assert found == {
        "data": 1.0,
        "teacher": 4.0,
        "decoder": 3.0,
        "head": 3.0,
        "backward": 5.0,
        "optimizer": 2.0,
        "rest": 2.0,
    }


def test_ratio_uses_medians_and_memory_is_compared_with_the_estimate(bench, tmp_path):
    phases = dict.fromkeys(bench.PHASES, 0.001)
    more = {**phases, "teacher": 0.050, "head": 0.020, "backward": 0.003}
    answer = {
        "device": "d",
        "threads": 1,
        "peak_bytes": 3 << 20,
        "parts": {"weights": 1 << 20, "teacher": 1 << 20},
        "estimate_bytes": 2 << 20,
        "seconds": {"distill": [0.1, 0.3, 0.2], "lm": [0.05, 0.9, 0.1], "teacher": [0.06]},
        "phases": {"distill": more, "lm": {**phases, "teacher": 0.0}},
    }
    rows = bench.rows_of(toy(tmp_path), answer, "abc")
    assert [row["median_ms"] for row in rows] == ["200", "100", "60"]
    assert [row.get("ratio") for row in rows] == ["1.250", None, None]
    bench.common.write_csv(tmp_path / "rows.csv", rows, bench.COLUMNS)
    text = bench.table_of(bench.common.read_csv(tmp_path / "rows.csv", ""), "cpu")
    assert [row.get("ratio_fastest") for row in rows] == ["0.909", None, None]
    assert "| distill | 200 | 100 - 300 | 100 | 1.250 | 0.909 | 1 | 50 | 1 | 20 | 3 | 1 | 1 |" in text
    assert "| 11.0 | 9.0 | 0.0 | 2.0 | 0.0 | 0.0 |" in text
    assert "| 3 | 2 | 1.50 | 1 | 1 |" in text


def test_every_published_row_has_its_numbers(bench):
    rows = bench.common.read_csv(bench.results_of("cpu"), "")
    assert [row["mode"] for row in rows] == list(bench.MODES) * len(bench.jobs("cpu"))
    for row in rows:
        assert float(row["median_ms"]) > 0
        assert bool(row["ratio"]) == bool(row["peak_bytes"]) == (row["mode"] == "distill")
    table = (bench.ROOT / "docs/results/bench_step_cpu.md").read_text(encoding="utf-8")
    assert table == bench.table_of(rows, "cpu")
