"""The job of continuous integration, with commands that only print: its order, its summary and its exit code."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "sh", "dirname", "id", "mkdir", "tee", "grep", "tail", "cat")  # not apt-get
QUICKSTART = """
case "$*" in
    install) cat "install" ;;
    test) cat "fast"; exit {fast} ;;
    "test slow") cat "slow"; exit {slow} ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    for name in ("launch", ".ci", ".venv/bin", "bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    for name in TOOLS:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    for name in ("lint", "newest"):
        (tmp_path / ".ci" / name).write_text(f"echo {name}\n")
    for name, text in {
        "install": "installed",
        "fast": "== 3 passed in 1.50s ==",
        "slow": "== 5 passed, 1 skipped in 70.00s (0:01:10) ==",
    }.items():
        (tmp_path / name).write_text(f"{text}\n")
    python = tmp_path / ".venv/bin/python"
    python.write_text('#!/bin/sh\necho "python $3"\n')
    python.chmod(0o755)
    return tmp_path


def run(tree, fast=0, slow=0):
    (tree / "launch/quickstart.sh").write_text(QUICKSTART.format(fast=fast, slow=slow))
    command = [str(tree / "bin/bash"), str(tree / ".ci/run")]
    env = {"PATH": str(tree / "bin")}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)


def test_job_installs_lints_and_runs_both_tiers_in_order(tree):
    done = run(tree)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == ["installed", "lint", "newest", "== 3 passed in 1.50s =="]
    assert lines[4] == "python install"
    assert [line.rpartition(" ")[0].rpartition(" ")[0] for line in lines[6:12]] == [
        "ci: installation and lint",
        "ci: newest releases",
        "ci: fast tier",
        "ci: extras of the slow tier",
        "ci: slow tier",
        "ci: whole job",
    ]
    assert lines[12:] == [
        "ci: fast tier: == 3 passed in 1.50s ==",
        "ci: slow tier: == 5 passed, 1 skipped in 70.00s (0:01:10) ==",
    ]


@pytest.mark.parametrize(("fast", "slow"), [(1, 0), (0, 2)])
def test_failure_in_either_tier_is_the_exit_code_and_both_have_run(tree, fast, slow):
    done = run(tree, fast, slow)
    assert done.returncode == (fast or slow)
    assert "ci: slow tier: == 5 passed" in done.stdout


def test_failing_lint_ends_the_job_before_the_tests(tree):
    (tree / ".ci/lint").write_text("exit 7\n")
    done = run(tree)
    assert done.returncode == 7
    assert "passed" not in done.stdout


def test_newest_releases_are_tested_by_both_tiers():
    command = (ROOT / ".ci/newest").read_text(encoding="utf-8").rpartition("-m pytest")[2]
    assert " -m ''" in command, "the tests of Triton's machine code are in the slow tier"
