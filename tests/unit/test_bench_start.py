"""The benchmark of starting: rows, ratios and goals from measured seconds; what it reads from a console."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    return import_module("bench_start")


TIMES = {
    ("check", "this"): [0.1, 0.2, 0.15],
    ("check", "base"): [0.3, 0.2, 0.3],
    ("first step", "this"): [10.0, 12.0],
    ("first step", "base"): [20.0, 20.0],
    ("one step", "this"): [14.0, 14.0],
    ("one step", "base"): [21.0, 21.0],
}


def test_ratios_are_of_medians_and_goals_are_this_checkouts(bench, tmp_path):
    rows = bench.rows_of(TIMES, {"this": "abc", "base": "def"}, 0.25)
    assert [(row["task"], row["provider"], row.get("time_ratio")) for row in rows] == [
        ("check", "this", "0.500"),
        ("check", "base", None),
        ("first step", "this", "0.550"),
        ("first step", "base", None),
        ("one step", "this", "0.667"),
        ("one step", "base", None),
    ]
    assert [row["commit"] for row in rows] == ["abc", "def"] * 3
    bench.common.write_csv(tmp_path / "rows.csv", rows, bench.COLUMNS)
    goals = bench.goals_of(rows)
    assert [(goal["name"], goal["measured"], goal["goal"], goal["better"]) for goal in goals] == [
        ("check_of_bad_file_seconds", "0.15", "0.25", "lower"),
        ("demo_start_to_first_step_ratio", "0.550", "0.7", "lower"),
    ]
    assert {goal["commit"] for goal in goals} == {"abc"}


def test_console_lines_are_distinguished(bench):
    evaluation = "eval   0/24  val_nll 10.8109  ppl 4.956e+04  top1 0.4%  overlap 4.3%  took 5s"
    step = "step   1/24  loss 8.0012  kd 7.6916  gnorm 1.23  lr 5.00e-04  tok/s 447"
    assert bench.EVALUATION.match(evaluation)[1] == "val_nll 10.8109  ppl 4.956e+04  top1 0.4%  overlap 4.3%"
    assert bench.FIRST_STEP.match(step)[1] == "loss 8.0012  kd 7.6916  gnorm 1.23"
    assert not bench.EVALUATION.match(evaluation.replace("  0/24", " 12/24"))
    assert not bench.FIRST_STEP.match(step.replace("  1/24", " 11/24"))


def test_a_refused_check_is_timed_and_an_accepted_one_is_an_error(bench, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(bench.BAD.format(root=ROOT), encoding="utf-8")
    assert bench.check_seconds(ROOT, bad) > 0
    bad.write_text("run: {seed: -1}\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="--check ended with 2"):
        bench.check_seconds(ROOT, bad)


def test_ranks_start_as_the_checkouts_quick_start_starts_them(bench, tmp_path):
    assert bench.ranks_command(ROOT) == [sys.executable, "launch/local_ranks.py", "2"]
    assert bench.ranks_command(tmp_path)[0] == "deepspeed"
