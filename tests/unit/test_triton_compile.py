"""The triton row kernels compile for GPUs that are not here, and their machine code is what was meant."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the short run of the benchmark says of each kernel, compiled anew: [{variant, target, registers, ...}]."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "benchmarks/triton_sass.py", "--quick"]
    done = subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_compile_for_every_target(compiled):
    for name in ("row_stats, T", "pair_grad jsd, T, bf16"):
        assert {row["target"] for row in compiled if row["variant"] == name} == TARGETS
    kernels = {row["variant"].split(",")[0].split()[0] for row in compiled if row["target"] == "sm_90"}
    assert kernels == {"first_argmax", "row_stats", "coupling", "pair_measure", "row_grad", "pair_sums", "pair_grad"}


def test_no_kernel_spills_registers_and_several_programs_fit_a_multiprocessor(compiled):
    for row in compiled:
        assert row["spills"] == row["stack"] == 0, row
        assert row["registers"] <= 128, row  # at least 2 programs of 256 threads


def test_slabs_are_read_and_written_in_wide_pieces(compiled):
    for row in compiled:
        per_slab = 2 if row["target"].startswith("sm") else 1  # 8 columns a thread; half as many, wider waves on AMD
        slabs = 1 if row["variant"].startswith(("row", "first")) else 2
        assert row["wide_loads"] >= slabs * per_slab, row
        if "_grad" in row["variant"] and row["target"] != "gfx942":  # which stores bfloat16 in 8 bytes
            assert row["wide_stores"] >= 1, row


def test_a_gradient_rounded_in_place_waits_for_all_loads_of_its_block(compiled):
    narrow = [row for row in compiled if "bf16" in row["variant"]]
    assert len(narrow) >= 5
    for row in narrow:
        assert row["barriers"] >= 1, row


def test_without_a_promise_about_the_stride_loads_would_be_narrow(compiled, tmp_path):
    """The gate above can fail: the same kernel without the divisibility of its stride."""
    script = (
        "import triton_sass as t\n"
        "t.DIVISIBLE = ()\n"
        "print(t.compile_one(next(v for v in t.variants() if v.name == 'row_stats, T'), 'sm_90')['wide_loads'])\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "kernels")])
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0"
