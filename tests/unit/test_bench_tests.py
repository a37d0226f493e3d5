"""The benchmark of the tests' time: what it reads from pytest's summary, and its goals."""

from importlib import import_module

import pytest


@pytest.fixture(scope="module")
def bench():
    return import_module("bench_tests")


def test_summary_counts_passed_and_skipped_tests(bench):
    output = "....\n===== 3836 passed, 8 skipped, 15 warnings in 1721.93s (0:28:41) =====\n"
    assert bench.summary_of(output) == (3836, 8)
    assert bench.summary_of("7 passed in 0.53s\nlast words of a child\n") == (7, 0)


@pytest.mark.parametrize("last", ["1 failed, 9 passed in 2.00s", "2 errors in 1.10s", "no tests ran in 0.01s", ""])
def test_summary_of_failed_or_missing_tests_is_refused(bench, last):
    with pytest.raises(ValueError, match="did not pass"):
        bench.summary_of(last)


def test_goals_are_the_ratio_of_both_runs_and_the_time_of_the_whole_job(bench):
    rows = [{"seconds": "1700.0", "commit": "a", "date": "d"}, {"seconds": "510.0", "commit": "b", "date": "d"}]
    goals = bench.goals_of(rows, 1440.0)
    assert [(g["name"], g["measured"], g["goal"], g["better"], g["commit"]) for g in goals] == [
        ("fast_tests_time_ratio", "0.300", "0.5", "lower", "b"),
        ("ci_run_seconds", "1440", "1500", "lower", "b"),
    ]
    assert len(bench.goals_of(rows, None)) == 1
