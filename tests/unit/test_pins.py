"""What setup.py allows, what the constraints pin, and what .ci/newest makes of the difference."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
MOVING = {"transformers", "deepspeed", "wandb", "torchao", "triton"}
"""Packages whose releases have changed results or interfaces under kdtrain: bounded at what has been proven."""


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


@pytest.fixture
def requirements(monkeypatch):
    found = {}
    monkeypatch.setattr(setuptools, "setup", lambda **settings: found.update(settings))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    lines = [*found["install_requires"], *(line for extra in found["extras_require"].values() for line in extra)]
    return [Requirement(line) for line in lines]


def test_both_constraints_pin_the_same_versions():
    cpu, gpu = pins("constraints-cpu.txt"), pins("constraints-gpu.txt")
    assert cpu.items() <= gpu.items()
    more = set(gpu) - set(cpu)
    assert all(re.match(r"nvidia-|cuda-|flash-attn$", name) for name in more), more


def test_setup_allows_the_pins_and_bounds_what_moves_fast(requirements):
    versions = {name.lower(): version for name, version in pins("constraints-gpu.txt").items()}
    for need in requirements:
        assert need.specifier.contains(versions[need.name.lower()]), f"{need} does not allow the pinned version"
        bounded = any(part.operator == "<" for part in need.specifier)
        assert bounded == (need.name in MOVING), f"{need}: an upper bound for {', '.join(sorted(MOVING))}, no others"


def test_setup_allows_only_series_of_triton_whose_machine_code_has_no_fault(requirements):
    """docs/results/triton_releases.md: | triton | compiled | faults | lines of warnings | setup.py |."""
    rows = (ROOT / "docs/results/triton_releases.md").read_text().splitlines()
    found = [row.strip("| ").split(" | ") for row in rows if re.match(r"\| \d+\.\d+\.\d+ \|", row)]
    assert len(found) >= 3
    compiled = {release.rpartition(".")[0] for release, *_ in found}
    series = [f"3.{minor}" for minor in range(20)]
    for bound in [need.specifier for need in requirements if need.name == "triton"]:
        assert {number for number in series if bound.contains(f"{number}.0")} <= compiled
        for release, _, faults, _, verdict in found:
            assert bound.contains(release) == (verdict == "allowed"), release
            assert verdict != "allowed" or faults == "0", release


REPORT = """#!{python}
import json, sys
if "--report" not in sys.argv:
    sys.exit("the job went on to install")
if {fails}:
    sys.exit("no index in reach")
needs = ["transformers<5.25,>=5.23", 'ruff>=0.9; extra == "dev"', 'wandb>=0.26; extra == "wandb"']
metadata = [{{"name": "kdtrain", "version": "0", "requires_dist": needs}}, *{changes}]
with open(sys.argv[sys.argv.index("--report") + 1], "w") as file:
    json.dump({{"install": [{{"metadata": item}} for item in metadata]}}, file)
"""


@pytest.mark.parametrize(
    ("changes", "fails", "says", "goes_on"),
    [
        ([], False, "newest: the pins are the newest releases that setup.py allows", False),
        ([{"name": "ruff", "version": "9"}, {"name": "idna", "version": "9"}], False, "newest: the pins are", False),
        ([{"name": "Transformers", "version": "5.24.9"}], False, r"transformers 5\.\d+\.\d+ -> 5.24.9", True),
        ([], True, "newest: pip could not say what the newest releases are", False),
    ],
)
def test_the_job_for_newest_releases_runs_only_where_pip_would_take_others(tmp_path, changes, fails, says, goes_on):
    """A folder with the job, the pins, and a .venv whose `python -m pip` writes the report of an index."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/newest").write_text((ROOT / ".ci/newest").read_text())
    (tmp_path / "constraints-cpu.txt").write_text((ROOT / "constraints-cpu.txt").read_text())
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "pip").write_text(REPORT.format(python=sys.executable, changes=json.dumps(changes), fails=fails))
    real = sys.executable
    python = f'#!/bin/sh\ncase "$2" in pip|venv) shift 2; exec {real} pip "$@";; esac\nexec {real} "$@"\n'
    (tmp_path / ".venv/bin/python").write_text(python)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    done = subprocess.run(
        ["sh", ".ci/newest", "--if-they-differ"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=dict(os.environ),
    )
    assert re.search(says, done.stdout), done.stdout + done.stderr
    assert ("the job went on to install" in done.stderr) is goes_on
    assert (done.returncode == 0) is not goes_on
