"""check_setup: its table in one process, rows of faults, and two ranks under the launcher."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdtrain.config.schema import RunConfig
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import KdtrainError
from kdtrain.jobs.check_setup import checks as setup_check
from kdtrain.jobs.check_setup import probes as setup_probes
from kdtrain.jobs.check_setup.probes import Row

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def launch(*command, **variables):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TRITON_INTERPRET")}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=env | variables, capture_output=True, text=True, timeout=200, check=False)


def table(text):
    """check -> (result, found) of the printed table."""
    rows = [re.split(r"  +", line, maxsplit=2) for line in text.splitlines()]
    return {row[0]: tuple(row[1:]) for row in rows if len(row) == 3 and row[1] in ("ok", "FAIL", "warn", "-")}


@pytest.mark.slow
@pytest.mark.deepspeed
def test_two_launched_ranks_check_every_axis_and_leave_no_files(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    done = launch(
        Path(sys.executable).with_name("deepspeed"),
        "--num_accelerators",
        2,
        "--master_port",
        port,
        ROOT / "launch/check_setup.py",
        ROOT / "configs/demo/distill_cpu.yaml",
        "parallel.tp=2",
        f"run.output_dir={tmp_path}/runs",
        NCCL_DEBUG="WARN",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = table(done.stdout)
    assert found["ranks"] == ("-", f"2 on 1 hosts: {socket.gethostname()}")
    assert found["version torch"] == ("ok", torch.__version__)
    assert found["kernels torch float32"] == ("ok", "8 divergences over tp 2: gradients within 0.0002 of float64")
    assert found["mesh"] == ("-", "dp 1 x cp 1 x tp 2")
    assert found["attention auto bfloat16"] == ("-", "packed: flash_attention_2 needs a CUDA device, this is cpu")
    assert "NCCL_DEBUG=WARN" in found["nccl settings"][1]
    assert re.match(r"1 per rank \(OMP_NUM_THREADS: 1\), \d ranks? on \d+ CPUs", found["threads"][1])
    assert found["collectives dp"] == ("-", "one rank")
    for name in ("all-reduce tp", "all-gather tp", "all-to-all tp", "all-reduce world", "all-to-all world"):
        assert re.fullmatch(r"2 ranks, 8 MiB in [\d.]+ ms: [\d.]+ GB/s", found[name][1])
    assert found["disk shared"] == ("ok", "every rank sees what rank 0 writes")
    assert done.stdout.count("version python") == 1
    assert "setup    every check passed" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.deepspeed
def test_missing_backend_of_the_run_fails_with_exit_code_1(tmp_path):
    done = launch(ROOT / "launch/check_setup.py", "train.kernels=triton", f"run.output_dir={tmp_path}")
    assert done.returncode == 1, done.stdout + done.stderr
    result, why = table(done.stdout)["kernels triton"]
    assert (result, why.split(":")[0]) == ("FAIL", "backend = 'triton' is not available for cpu")
    assert "1 of 30 checks failed" in done.stdout


def test_help_and_configuration_errors_need_no_torch():
    done = launch(ROOT / "launch/check_setup.py", "--help")
    assert (done.returncode, done.stdout.startswith("Check versions, devices, kernels")) == (0, True)
    done = launch(ROOT / "launch/check_setup.py", "parallel.tpp=2")
    assert done.returncode == 2
    assert "did you mean parallel.tp?" in done.stderr


@pytest.mark.parametrize("spoil", ["hidden", "head"])
def test_kernel_with_a_wrong_gradient_is_a_failed_row(monkeypatch, spoil):
    good = setup_probes.kernel_rows(Mesh(), CPU, "auto")
    assert [(row.check, row.result) for row in good] == [
        ("kernels torch float32", "ok"),
        ("kernels torch bfloat16", "ok"),
        ("kernels triton", "-"),
    ]
    real = setup_probes.linear_kd_loss

    def wrong(hidden, head, *given, **settings):
        parts = real(hidden, head, *given, **settings)
        skewed = hidden if spoil == "hidden" else head
        extra = (skewed - skewed.detach()).sum() * 0.1
        return SimpleNamespace(loss=parts.loss + extra)

    monkeypatch.setattr(setup_probes, "linear_kd_loss", wrong)
    bad = setup_probes.kernel_rows(Mesh(), CPU, "auto")
    assert [row.result for row in bad] == ["FAIL", "FAIL", "-"]
    assert re.match(r"over tp 1: \w+ is off by ", bad[0].found)


def test_kernel_that_raises_is_a_failed_row(monkeypatch):
    def broken(*given, **settings):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(setup_probes, "linear_kd_loss", broken)
    rows = setup_probes.kernel_rows(Mesh(), CPU, "auto")
    assert rows[0] == Row("kernels torch", "FAIL", "RuntimeError: no compiler")


def test_error_of_a_nonfinite_loss_is_infinite():
    assert setup_probes._relative(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]).double()) == float("inf")
    assert setup_probes._relative(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]).double()) == 0.25


@pytest.mark.deepspeed
def test_unavailable_attention_fails_and_tf32_warns(tmp_path):
    done = launch(
        ROOT / "launch/check_setup.py",
        "student.attention=flash_attention_4",
        "student.dtype=bfloat16",
        f"run.output_dir={tmp_path}",
        TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = table(done.stdout)
    assert found["attention student"] == (
        "FAIL",
        "attention = 'flash_attention_4' cannot be used: flash_attention_4 needs a CUDA device, this is cpu",
    )
    assert found["float32 products"][0] == "warn"
    assert "1 of 31 checks failed, 1 warning" in done.stdout


def test_equal_findings_share_a_line_and_different_versions_fail():
    one = [Row("version torch", "ok", "2.13"), Row("device", "-", "cpu"), Row("disk", "ok", "70 GiB")]
    other = [Row("version torch", "ok", "2.12"), Row("device", "-", "cpu"), Row("disk", "FAIL", "read-only")]
    assert setup_check.merge([one, one, other], ["a", "a", "b"]) == [
        Row("ranks", "-", "3 on 2 hosts: a, b"),
        Row("version torch", "FAIL", "2.13   [ranks 0-1 on a]"),
        Row("version torch", "FAIL", "2.12   [rank 2 on b]"),
        Row("device", "-", "cpu"),
        Row("disk", "ok", "70 GiB   [ranks 0-1 on a]"),
        Row("disk", "FAIL", "read-only   [rank 2 on b]"),
    ]


def test_ranks_with_other_choices_are_named():
    one = [
        Row("attention auto bfloat16", "-", "flash_attention_2"),
        Row("nccl settings", "-", "none set"),
        Row("threads", "ok", "8 per rank"),
    ]
    other = [
        Row("attention auto bfloat16", "-", "sdpa"),
        Row("nccl settings", "ok", "NCCL_DEBUG=INFO"),
        Row("threads", "ok", "4 per rank"),
    ]
    ranks = [one, other, one, one, other]
    assert setup_check.merge(ranks, ["a"] * 5)[1:] == [
        Row("attention auto bfloat16", "FAIL", "flash_attention_2   [ranks 0, 2-3]"),
        Row("attention auto bfloat16", "FAIL", "sdpa   [ranks 1, 4]"),
        Row("nccl settings", "warn", "none set   [ranks 0, 2-3]"),
        Row("nccl settings", "warn", "NCCL_DEBUG=INFO   [ranks 1, 4]"),
        Row("threads", "ok", "8 per rank   [ranks 0, 2-3]"),
        Row("threads", "ok", "4 per rank   [ranks 1, 4]"),
    ]


def test_last_line_counts_failures_and_warnings():
    ok, warned, failed = (Row("a", result, "") for result in ("ok", "warn", "FAIL"))
    assert setup_check.verdict([ok]) == "setup    every check passed"
    assert setup_check.verdict([ok, warned]) == "setup    every check passed, 1 warning"
    assert setup_check.verdict([ok, failed]) == "1 of 2 checks failed"
    assert setup_check.verdict([failed, warned, warned]) == "1 of 3 checks failed, 2 warnings"


def test_long_list_of_hosts_is_shortened():
    rows = setup_check.merge([[]] * 10, [f"h{n}" for n in range(10)])
    assert rows == [Row("ranks", "-", "10 on 10 hosts: h0, h1, h2, h3, h4, h5, h6, h7 and 2 more")]


def test_unwritable_folder_is_a_failed_row(tmp_path, monkeypatch):
    def refuse(**given):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(setup_check.tempfile, "mkdtemp", refuse)
    (row,) = setup_check.disk_rows(tmp_path / "runs" / "deeper", Mesh())
    assert row == Row("disk", "FAIL", f"{tmp_path}: Permission denied; set run.output_dir to a folder you may write")


def test_unresolvable_master_address_is_an_error_before_joining(monkeypatch):
    def unknown(host, port):
        raise socket.gaierror(-2, "Name or service not known")

    setup_check._check_master(None)
    monkeypatch.setattr(setup_check.socket, "getaddrinfo", unknown)
    with pytest.raises(KdtrainError, match=r"cannot resolve MASTER_ADDR = gpu7: Name or (.|\n)*fix: ") as caught:
        setup_check._check_master("gpu7")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("name", "operation"),
    [("all-reduce", "reduce_sum_"), ("all-gather", "gather_ranks"), ("all-to-all", "exchange_ranks")],
)
def test_collective_with_wrong_numbers_is_a_failed_row(monkeypatch, name, operation):
    """A group of two whose other rank is played by arithmetic: what this rank 0 sends and what rank 1 would."""
    monkeypatch.setattr(setup_probes, "CPU_BYTES", 4096)
    monkeypatch.setattr(setup_probes, "group_size", lambda group: 2 if group == "two" else 1)
    monkeypatch.setattr(setup_probes, "group_rank", lambda group: 0)
    base = setup_probes._buffer(2, CPU)
    honest = {
        "reduce_sum_": lambda x, group: x + base + 1,
        "gather_ranks": lambda x, group: torch.stack([x, base[0] + 1]),
        "exchange_ranks": lambda x, group: torch.stack([x[0], base[0] + 1000]),
    }
    for other, answer in honest.items():
        monkeypatch.setattr(setup_probes, other, answer)
    mesh = SimpleNamespace(tp_group="two", cp_group=None, dp_group=None, world_group=None, world_size=1)
    assert [row.result for row in setup_probes.collective_rows(mesh, CPU)] == ["ok", "ok", "ok", "-", "-", "-"]
    monkeypatch.setattr(setup_probes, operation, lambda x, group: honest[operation](x, group) * 1.001)
    rows = {row.check: row for row in setup_probes.collective_rows(mesh, CPU)}
    assert rows.pop(f"{name} tp") == Row(f"{name} tp", "FAIL", "2 ranks: wrong numbers")
    assert {row.result for row in rows.values()} == {"ok", "-"}


def test_collectives_are_checked_along_the_axes_of_the_run():
    cfg = RunConfig()
    cfg.parallel.tp, cfg.parallel.cp = 2, 2
    assert setup_check.axes(cfg, 8) == setup_check.axes(cfg, 6) == (2, 2), "Mesh.build refuses what does not divide"
    cfg.teacher.layout = "dedicated"
    assert setup_check.axes(cfg, 8) == (2, 2)
    assert setup_check.axes(cfg, 6) == (1, 1)
    rows = [setup_check.mesh_row(cfg, Mesh(world_size=n, tp_size=tp, cp_size=tp)).found for n, tp in ((8, 2), (6, 1))]
    assert rows[0] == "dp 2 x cp 2 x tp 2; all ranks as one world, without the teacher's messages"
    assert rows[1].startswith("dp 6 x cp 1 x tp 1; parallel.tp = 2 x parallel.cp = 2 divide the student's ranks only; ")
