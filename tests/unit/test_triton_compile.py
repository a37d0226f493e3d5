"""The triton row kernels compile for GPUs that are not present, and their machine code has the intended form."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_waits import in_flight_amd, in_flight_nvidia

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Results of the short run of the script for each kernel, compiled anew: [{variant, target, registers, ...}]."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "proofs/triton_sass.py", "--quick"]
    done = subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_kernels_compile_for_every_target(compiled):
    for name in ("row_stats, T", "pair_grad jsd, T, bf16"):
        assert {row["target"] for row in compiled if row["variant"] == name} == TARGETS
    kernels = {row["variant"].split(",")[0].split()[0] for row in compiled if row["target"] == "sm_90"}
    assert kernels == {"first_argmax", "row_stats", "coupling", "pair_measure", "row_grad", "pair_sums", "pair_grad"}


@pytest.mark.slow
def test_no_kernel_spills_registers_and_several_programs_fit_a_multiprocessor(compiled):
    for row in compiled:
        assert row["spills"] == 0, row
        assert row["registers"] <= 128, row  # at least 2 programs of 256 threads


@pytest.mark.slow
def test_slabs_are_read_and_written_16_bytes_at_a_time(compiled):
    for row in compiled:
        per_slab = 2 if row["target"].startswith("sm") else 1  # 8 columns a thread; half as many, wider waves on AMD
        slabs = 1 if row["variant"].startswith(("row", "first")) else 2
        assert row["wide_loads"] >= slabs * per_slab, row
        if "_grad" in row["variant"] and row["target"] != "gfx942":  # which stores bfloat16 in 8 bytes
            assert row["wide_stores"] >= 1, row


@pytest.mark.slow
def test_no_load_is_in_flight_at_the_barrier_of_in_place_rounding(compiled):
    narrow = [row for row in compiled if "bf16" in row["variant"]]
    assert len(narrow) >= 5
    for row in narrow:
        assert row["barriers"] == 1 if row["kernel"] == "row_grad_kernel" else row["barriers"] >= 1, row
        assert row["in_flight"] == 0, row


@pytest.mark.slow
def test_fusion_of_products_and_sums_is_disabled_in_every_kernel(compiled):
    assert {row["fusion"] for row in compiled} == {False}


def run(script, tmp_path):
    """Output of a script that imports proofs/triton_sass.py as `t`, compiling anew."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("proofs", "benchmarks", "kernels"))
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", "import triton_sass as t\n" + script]
    done = subprocess.run(command, check=True, env=env, capture_output=True, text=True, timeout=120)
    return done.stdout.strip()


@pytest.mark.slow
def test_loads_are_narrow_without_the_stride_assumption(compiled, tmp_path):
    """The gate above can fail: the same kernel without the divisibility of its stride."""
    script = (
        "t.DIVISIBLE = ()\n"
        "print(t.compile_one(next(v for v in t.variants() if v.name == 'row_stats, T'), 'sm_90')['wide_loads'])\n"
    )
    assert run(script, tmp_path) == "0"


def test_loads_are_in_flight_at_a_plain_barrier(tmp_path):
    """The gate above can fail: the same kernel with tl.debug_barrier() alone, on an NVIDIA and an AMD target."""
    script = (
        "variant = next(v for v in t.variants() if v.name == 'row_grad, cap, bf16')\n"
        "print([t.compile_one(variant, target, '')['in_flight'] for target in ('sm_90', 'gfx942')])\n"
    )
    assert run(script, tmp_path) == "[2, 1]"


@pytest.mark.parametrize(
    ("assembly", "most"),
    [
        ("global_load_dwordx4 v[0:3], v4, s[0:1]\ns_barrier", 1),
        ("buffer_load_dwordx4 v[0:3], v4\ns_waitcnt vmcnt(0)\ns_barrier", 0),
        ("global_load_dwordx4 v[0:3], v4\nglobal_store_short v4, v5\ns_waitcnt vmcnt(1)\ns_barrier", 0),
        ("global_store_short v4, v5\nglobal_load_dwordx4 v[0:3], v4\ns_waitcnt vmcnt(1)\ns_barrier", 1),
        ("global_load_dwordx4 v[0:3], v4\ns_waitcnt lgkmcnt(0)\ns_barrier", 1),
        ("s_barrier\nglobal_load_dwordx4 v[0:3], v4 ; s_waitcnt vmcnt(0)", 1),  # a loop's end
        ("global_load_dword v0, v4\ns_barrier", 0),  # not of a slab
    ],
)
def test_waits_are_counted_as_gfx9_counts_them(assembly, most):
    assert in_flight_amd(assembly) == most


def instruction(text, waits=0, scoreboard=7):
    return f"/*0010*/ {text} ; /* 0x{0:016x} */\n /* 0x{waits << 52 | scoreboard << 46:016x} */\n"


@pytest.mark.parametrize(
    ("code", "most"),
    [
        ([("LDG.E.128 R4, [R2.64]", 0, 2), ("BAR.SYNC 0x0",)], 1),
        ([("LDG.E.128 R4, [R2.64]", 0, 2), ("BAR.SYNC 0x0", 1 << 2)], 0),
        ([("LDG.E.128 R4, [R2.64]", 0, 2), ("FADD R0, R4, R4", 1 << 2), ("BAR.RED.OR 0x0, P1",)], 0),
        ([("LDG.E.128 R4, [R2.64]", 0, 2), ("FADD R0, R4, R4", 1 << 3), ("BAR.RED.OR 0x0, P1",)], 1),
        ([("BAR.SYNC.DEFER_BLOCKING 0x0",), ("@!P0 LDG.E.EF.128 R4, [R2.64]", 0, 1)], 1),  # a loop's end
        ([("LDG.E R4, [R2.64]", 0, 2), ("BAR.SYNC 0x0",)], 0),  # not of a slab
    ],
)
def test_waits_are_read_from_the_scoreboards_of_an_instruction(code, most):
    assert in_flight_nvidia("".join(instruction(*line) for line in code)) == most


def test_unknown_form_of_machine_code_is_an_error():
    with pytest.raises(ValueError, match="has cuobjdump's output changed"):
        in_flight_nvidia("BAR.SYNC 0x0")
