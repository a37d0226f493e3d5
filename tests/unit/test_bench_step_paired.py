"""The paired benchmark of steps: rounds take turns, ratios are of rounds, each checkout runs its own code."""

from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture
def bench():
    return import_module("bench_step_paired")


def test_checkouts_take_turns_with_their_own_code(bench, monkeypatch):
    calls = []

    def run_job(job, script, **environment):
        calls.append((script, environment["PYTHONPATH"]))
        return {"seconds": {"distill": [0.2, 0.4, 0.3], "lm": [0.1, 0.1, 0.1]}}

    monkeypatch.setattr(bench.bench_step, "run_job", run_job)
    roots = {"this": Path("/a"), "base": Path("/b")}
    found = bench.measure(bench.jobs()[0], roots, 2)
    assert [script for script, _ in calls] == [f"/{name}/benchmarks/bench_step.py" for name in "abba"]
    assert {path for _, path in calls} == {"/a:/a/kernels", "/b:/b/kernels"}
    assert {key: len(rounds) for key, rounds in found.items()} == {
        (mode, name): 2 for mode in ("distill", "lm") for name in roots
    }


def test_ratios_compare_the_rounds_and_the_goal_is_the_slowest(bench):
    found = {
        ("distill", "this"): [[0.2, 0.4, 0.3], [0.6, 0.6, 0.6]],
        ("distill", "base"): [[0.3, 0.3, 0.3], [0.5, 0.5, 0.5]],
        ("lm", "this"): [[0.1], [0.1]],
        ("lm", "base"): [[0.1], [0.2]],
    }
    rows = bench.rows_of(bench.jobs()[1], found, {"this": "abc", "base": "def"}, 0.25)
    assert [(row["mode"], row["provider"], row.get("ratio"), row.get("ratio_fastest")) for row in rows] == [
        ("distill", "this", "1.100", "0.667"),
        ("distill", "base", None, None),
        ("lm", "this", "0.750", "1.000"),
        ("lm", "base", None, None),
    ]
    assert (rows[0]["runs"], rows[0]["load"], rows[1]["commit"], rows[0]["median_ms"]) == (6, "0.25", "def", "500")
    goal = bench.goal_of(rows)
    assert (goal["name"], goal["measured"], goal["goal"], goal["commit"]) == (
        "whole_step_time_ratio",
        "1.100",
        "1.03",
        "abc",
    )


def test_jobs_are_those_of_the_step_benchmark(bench):
    assert [(job["teacher"], job["ranks"], job["tp"]) for job in bench.jobs()] == [
        ("llama-20m", 1, 1),
        ("llama-20m", 2, 2),
    ]
