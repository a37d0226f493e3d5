"""Rows of check_setup about settings of a machine, each with a good and a bad setting."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from kdtrain.config.schema import RunConfig
from kdtrain.distributed.mesh import Mesh
from kdtrain.jobs.check_setup import settings as setup_settings
from kdtrain.jobs.check_setup.probes import Row
from kdtrain.jobs.check_setup.settings import Share, compiler_row, float32_row, nccl_files, nccl_row, threads_row
from kdtrain.telemetry.environment import settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TWO_AXES = Mesh(world_size=4, tp_size=2)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_compiler_of_CC_or_PATH_builds_with_python_headers():
    environ = {"PATH": str(Path(shutil.which("gcc")).parent)}
    found = compiler_row(CUDA, environ)
    assert found.check == "compiler"
    if not Path(setup_settings.sysconfig.get_paths()["include"], "Python.h").exists():
        assert found.result == "warn"
        assert "Python.h: No such file" in found.found
        return
    assert found.result == "ok", found
    assert "gcc" in found.found
    assert compiler_row(CUDA, {"PATH": "", "CC": shutil.which("gcc")}) == found


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_compiler_without_python_headers_warns(tmp_path, monkeypatch):
    """As where python3-dev is not installed. The line must be the same on every rank: no temporary folder in it."""
    monkeypatch.setattr(setup_settings.sysconfig, "get_paths", lambda **given: {"include": str(tmp_path)})
    rows = {compiler_row(CUDA, {"CC": "gcc"}) for _ in range(2)}
    assert rows == {
        Row(
            "compiler",
            "warn",
            "gcc cannot build with Python's headers: fatal error: Python.h: No such file or "
            "directory; Triton compiles a launcher for each kernel",
        )
    }


def test_missing_compiler_warns_on_cuda_only(tmp_path):
    row = compiler_row(CUDA, {"PATH": str(tmp_path)})
    assert row == Row(
        "compiler", "warn", "none: neither CC nor gcc nor clang; Triton compiles a launcher for each kernel"
    )
    assert compiler_row(CPU, {"PATH": str(tmp_path)}).result == "-"
    absent = compiler_row(CUDA, {"PATH": str(tmp_path), "CC": str(tmp_path / "cc")})
    assert absent.found.startswith(f"{tmp_path}/cc cannot be run: No such file or directory")
    failing = compiler_row(CUDA, {"CC": shutil.which("false") or sys.executable})
    assert (failing.result, "cannot build" in failing.found) == ("warn", True)


def test_attention_rows_show_packages_and_the_choice_of_auto():
    cfg = RunConfig()
    rows = {row.check: row for row in setup_settings.attention_rows(cfg, CPU)}
    assert list(rows) == [
        *(f"attention flash_attention_{n}" for n in (2, 3, 4)),
        "attention auto bfloat16",
        "attention auto float32",
    ]
    assert rows["attention auto float32"] == Row(
        "attention auto float32", "-", "packed: flash_attention_2 needs a CUDA device, this is cpu"
    )
    on_cuda = {row.check: row for row in setup_settings.attention_rows(cfg, CUDA)}
    assert on_cuda["attention auto float32"].found == "packed: flash_attention_2 needs bfloat16, this is float32"


def test_installed_package_that_cannot_be_used_warns(monkeypatch):
    monkeypatch.setattr(setup_settings, "attention_packages", lambda: [("flash_attention_2", "2.8.3 is broken")])
    monkeypatch.setattr(setup_settings, "installed_version", lambda name: "2.8.3")
    row, *_ = setup_settings.attention_rows(RunConfig(), CPU)
    assert row == Row("attention flash_attention_2", "warn", "2.8.3 is broken")
    monkeypatch.setattr(setup_settings, "attention_packages", lambda: [("flash_attention_2", "2.8.3")])
    row, *_ = setup_settings.attention_rows(RunConfig(), CPU)
    assert row == Row("attention flash_attention_2", "ok", "2.8.3")


def test_explicit_attention_passes_or_fails():
    cfg = RunConfig()
    cfg.student.attention, cfg.teacher.attention, cfg.teacher.dtype = "eager", "flash_attention_2", "float32"
    *_, student, teacher = setup_settings.attention_rows(cfg, CUDA)
    assert student == Row("attention student", "ok", f"eager in {cfg.student.dtype}, as configured")
    assert teacher == Row(
        "attention teacher",
        "FAIL",
        "attention = 'flash_attention_2' cannot be used: flash_attention_2 needs bfloat16, this is float32",
    )


def test_nccl_row_lists_only_settings_of_nccl():
    found = settings({"TORCH_NCCL_BLOCKING_WAIT": "1", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "8", "KEY": "secret"})
    listed = "NCCL_DEBUG=INFO, TORCH_NCCL_BLOCKING_WAIT=1"
    assert nccl_row(TWO_AXES, found, None) == Row("nccl settings", "-", f"{listed}; no CUDA device")
    assert nccl_row(TWO_AXES, {}, None).found == "none set; no CUDA device"


@pytest.mark.parametrize(
    ("value", "version", "mesh", "result", "part"),
    [
        (None, "2.29.7", TWO_AXES, "warn", "IMPLICIT is off: collectives of two axes may wait for each other"),
        ("0", "2.29.7", TWO_AXES, "warn", "IMPLICIT is off: "),
        ("yes", "2.29.7", TWO_AXES, "warn", "IMPLICIT is off: "),
        ("1", "2.25.1", TWO_AXES, "warn", "NCCL 2.25.1 does not have NCCL_LAUNCH_ORDER_IMPLICIT: "),
        (None, "2.29.7", Mesh(world_size=4), "-", "IMPLICIT is off"),
        ("1", "2.26.2", TWO_AXES, "ok", "NCCL_LAUNCH_ORDER_IMPLICIT=1; collectives start in the order of the host"),
    ],
)
def test_launch_order_row_by_setting_version_and_axes(value, version, mesh, result, part):
    found = {} if value is None else {"NCCL_LAUNCH_ORDER_IMPLICIT": value}
    row = nccl_row(mesh, found, version)
    assert row.result == result
    assert part in row.found
    assert result != "-" or row.found.endswith(part)


def test_nccl_files_are_read_as_by_nccl(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("# NCCL_A=comment\nNCCL_A=1\nNCCL_A=2\nno setting\nNCCL_B=x=y\n")
    second.write_text("NCCL_A=3\nNCCL_C=4\n")
    files = (str(first), str(second))
    assert nccl_files({}, files) == {"NCCL_A": "1", "NCCL_B": "x=y", "NCCL_C": "4"}
    assert nccl_files({"NCCL_CONF_FILE": str(tmp_path / "none")}, files) == {"NCCL_A": "3", "NCCL_C": "4"}


def test_environment_overrides_nccl_files(tmp_path):
    (tmp_path / "conf").write_text("NCCL_DEBUG=INFO\nNCCL_IB_HCA=mlx5\n")
    environ = {"NCCL_CONF_FILE": str(tmp_path / "conf"), "NCCL_DEBUG": "WARN"}
    alone = Share("a", 1, frozenset({0}))
    rows = setup_settings.settings_rows(RunConfig(), Mesh(), CPU, alone, [alone], environ)
    (found,) = (row.found for row in rows if row.check == "nccl settings")
    assert "NCCL_DEBUG=WARN, NCCL_IB_HCA=mlx5" in found


def test_float32_products_are_exact_on_the_cpu():
    assert float32_row(CPU, {}) == Row(
        "float32 products", "ok", "exact (torch's precision is highest, convolutions may use TF32)"
    )


def test_products_rounded_to_tf32_are_detected(monkeypatch):
    """As a tensor core makes them: 13 bits fewer, to the nearest, and sums in float32."""
    exact = torch.Tensor.__matmul__

    def rounded(x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: exact(rounded(a), rounded(b)))
    row = float32_row(CPU, {"NVIDIA_TF32_OVERRIDE": "1"})
    assert row.result == "warn"
    assert row.found.startswith(
        "rounded to TF32 or less (torch's precision is highest, NVIDIA_TF32_OVERRIDE=1, convolutions"
    )


@pytest.mark.parametrize(
    ("precision", "environ", "result"),
    [
        ("high", {}, "warn"),
        ("highest", {"NVIDIA_TF32_OVERRIDE": "1"}, "warn"),
        ("highest", {"NVIDIA_TF32_OVERRIDE": "0"}, "ok"),
        ("high", {"NVIDIA_TF32_OVERRIDE": "0", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}, "ok"),
    ],
)
def test_tf32_settings_warn_on_a_cpu_too(precision, environ, result):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        row = float32_row(CPU, environ)
    finally:
        torch.set_float32_matmul_precision(before)
    assert row.result == result
    assert f"torch's precision is {precision}" in row.found
    assert all(f"{name}={value}" in row.found for name, value in environ.items())
    assert ("convolutions" in row.found) == (environ.get("NVIDIA_TF32_OVERRIDE") != "0")


def shares(threads, *masks, host="a"):
    return [Share(host, threads, frozenset(mask)) for mask in masks]


@pytest.mark.parametrize(
    ("threads", "masks", "result", "part"),
    [
        (4, [range(8)] * 2, "ok", "4 per rank (OMP_NUM_THREADS: not set), 2 ranks on 8 CPUs"),
        (8, [range(8)] * 2, "warn", "2 ranks on 8 CPUs: too many; set OMP_NUM_THREADS=4"),
        (4, [range(4), range(4, 8)], "ok", "1 rank on 4 CPUs"),
        (8, [range(4), range(4, 8)], "warn", "1 rank on 4 CPUs: too many; set OMP_NUM_THREADS=4"),
        (1, [range(2)] * 3, "warn", "3 ranks on 2 CPUs: too many; start fewer ranks, or give them more CPUs"),
        (1, [range(8)] * 2, "ok", "2 ranks on 8 CPUs"),
    ],
)
def test_threads_row_counts_the_ranks_that_share_cpus(threads, masks, result, part):
    here, elsewhere = shares(threads, *masks), shares(64, range(8), range(8), host="b")
    row = threads_row(here[0], [*here, *elsewhere], {}, offload=False)
    assert row.result == result
    assert part in row.found


@pytest.mark.parametrize(
    ("threads", "masks", "environ", "result", "part"),
    [
        (1, [range(8)] * 2, {"OMP_NUM_THREADS": "1"}, "warn", "one core steps the offloaded optimizer; set OMP_NUM_"),
        (1, [range(8)] * 2, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, "ok", "the offloaded step: 4"),
        (4, [range(8)] * 2, {}, "ok", "2 ranks on 8 CPUs; the offloaded step: 4"),
        (8, [range(8)] * 2, {}, "warn", "2 ranks on 8 CPUs; the offloaded step: 4: too many; set OMP_NUM_THREADS=4"),
        (1, [range(2)] * 2, {"OMP_NUM_THREADS": "1"}, "ok", "2 ranks on 2 CPUs; the offloaded step: 1"),
        (2, [range(8)] * 2, {"OMP_NUM_THREADS": "2"}, "ok", "2 ranks on 8 CPUs; the offloaded step: 2"),
    ],
)
def test_threads_row_of_an_offloaded_optimizer(threads, masks, environ, result, part):
    here = shares(threads, *masks)
    row = threads_row(here[0], [*here, *shares(1, range(8), host="b")], environ, offload=True)
    assert row.result == result
    assert part in row.found


def test_share_of_this_rank():
    mine = Share.of_this_rank("a")
    assert mine.threads == torch.get_num_threads()
    assert mine.cpus
    row = threads_row(mine, [mine], {"OMP_NUM_THREADS": "3"}, offload=False)
    assert f"(OMP_NUM_THREADS: 3), 1 rank on {len(mine.cpus)} CPUs" in row.found


def test_kernels_row_names_the_choice_of_auto_and_its_reason(monkeypatch):
    assert setup_settings.kernels_row(CPU) == Row("kernels auto", "-", "torch: the device is not CUDA")
    monkeypatch.setattr(setup_settings, "choice", lambda device: ("torch", f"a launch on {device} fails"))
    rows = {setup_settings.kernels_row(torch.device("cuda", index)) for index in range(2)}
    assert rows == {Row("kernels auto", "warn", "torch: a launch on cuda fails")}
