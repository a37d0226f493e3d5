"""The oldest torch that the kernels run with, decided from its version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kdtrain_kernels.versions import torch_problem

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "version", ["2.10.0", "2.10", "2.10.0+cu130", "2.10.1.post1", "2.13.0+cpu", "2.11.0a0+git", "3.0"]
)
def test_torch_at_or_above_the_floor_has_no_problem(version):
    assert torch_problem(version) == ""


@pytest.mark.parametrize(
    "version", ["2.9.1", "2.8.0+cu128", "1.13", "2.10.0a0+b558c986e8", "2.10.0.dev20251101", "2.10.0rc1", "?"]
)
def test_an_older_torch_or_an_early_build_of_the_floor_is_refused(version):
    what, why, fix = torch_problem(version).splitlines()
    assert what == f"kdtrain_kernels needs torch >= 2.10, found {version}"
    assert why.startswith("  why: ")
    assert fix == "  fix: pip install 'torch>=2.10'"


def test_importing_the_kernels_refuses_an_older_torch():
    script = "import torch; torch.__version__ = '2.9.1'; import kdtrain_kernels"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False, timeout=100
    )
    assert "ImportError: kdtrain_kernels needs torch >= 2.10, found 2.9.1" in done.stderr
