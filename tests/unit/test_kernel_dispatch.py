"""Choice of kernels: triton is used only after a test launch. CUDA devices are named but not used."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kdtrain_kernels import dispatch, torch_rows
from kdtrain_kernels.dispatch import CapturingError, choice, row_kernels
from kdtrain_kernels.sparse_dispatch import sparse_kernels

from kdtrain.errors import ConfigError
from kdtrain.jobs.build.models import check_kernels
from tests.support.loss_cases import loss_of, random_case

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU, OTHER_GPU = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Launches:
    """A probe: the devices it was called for; raises what it is given."""

    def __init__(self, error=None):
        self.devices = []
        self.error = error

    def __call__(self, device):
        self.devices.append(device)
        if self.error is not None:
            raise self.error


@pytest.fixture(autouse=True)
def choices_are_logged_anew():
    dispatch._log_choice.cache_clear()


@needs_triton
def test_auto_takes_triton_after_one_launch_per_device(caplog):
    caplog.set_level(logging.INFO, "kdtrain")
    probe = Launches()
    for _ in range(3):
        assert row_kernels("auto", GPU, probe=probe).__name__ == "kdtrain_kernels.triton.rows"
    assert row_kernels("triton", GPU, probe=probe).__name__ == "kdtrain_kernels.triton.rows"
    assert probe.devices == [GPU]
    assert choice(OTHER_GPU, probe=probe) == ("triton", "the device is CUDA, and one row was launched on it")
    assert probe.devices == [GPU, OTHER_GPU]
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "row kernels on cuda: triton, because the device is CUDA, and one row was launched on it")
    ]


@needs_triton
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore"),
        subprocess.CalledProcessError(1, ["gcc"]),
        ImportError("libcuda.so.1: cannot open shared object file"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_auto_falls_back_to_torch_if_a_launch_fails_and_warns_once(caplog, error):
    probe = Launches(error)
    for _ in range(3):
        assert row_kernels("auto", GPU, probe=probe) is torch_rows
    assert probe.devices == [GPU]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    message = record.getMessage()
    assert message.startswith(
        f"row kernels on cuda: torch, because a launch on cuda:0 fails with {type(error).__name__}: "
    )
    assert message.endswith(str(error).partition("\n")[0])


@needs_triton
def test_explicit_triton_is_refused_with_the_reason_if_a_launch_fails():
    probe = Launches(RuntimeError("Failed to find C compiler."))
    with pytest.raises(
        ValueError, match=r"not available for cuda: a launch on cuda:0 fails .* C compiler\.; choose torch"
    ):
        row_kernels("triton", GPU, probe=probe)
    with pytest.raises(ConfigError) as refused:
        check_kernels("triton", GPU, probe)
    what, why, fix = str(refused.value).splitlines()
    assert what == "train.kernels = triton cannot run on cuda:0"
    assert "Failed to find C compiler." in why
    assert fix.startswith("  fix: ")
    check_kernels("auto", GPU, probe)


@needs_triton
def test_launch_inside_a_capture_is_not_cached_as_a_result():
    probe = Launches(CapturingError("captured"))
    for backend in ("auto", "triton"):
        with pytest.raises(CapturingError, match="captured"):
            row_kernels(backend, GPU, probe=probe)
    probe.error = None
    assert choice(GPU, probe=probe)[0] == "triton"


@needs_triton
def test_explicit_triton_without_a_device_or_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA device, or TRITON_INTERPRET=1"):
        row_kernels("triton", CPU)
    with pytest.raises(ValueError, match="choose torch"):
        loss_of(random_case(3, 11), backend="triton")


@needs_triton
def test_float64_and_cpus_take_torch_without_a_launch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    probe = Launches()
    assert choice(CPU, probe=probe) == ("torch", "the device is not CUDA")
    assert row_kernels("auto", CPU) is torch_rows
    assert choice(GPU, torch.float64, probe) == ("torch", "it works on float32 logits, not torch.float64")
    assert sparse_kernels("auto", CPU, torch.float32).__name__ == "kdtrain_kernels.sparse_rows"
    assert probe.devices == []


@needs_triton
def test_launch_of_one_row_runs_in_the_interpreter_and_detects_a_wrong_result():
    script = (
        "import torch\n"
        "from kdtrain_kernels.dispatch import launch_one_row\n"
        "from kdtrain_kernels.triton import probe\n"
        "from triton.compiler.errors import CompilationError\n"
        "cpu = torch.device('cpu')\n"
        "launch_one_row(cpu)\n"
        "answer = probe.first_argmax\n"
        "def refuse(slab, scratch):\n"
        "    raise CompilationError('line', None, 'no such instruction')\n"
        "for broken in (lambda slab, scratch: answer(slab, scratch) + 1, refuse):\n"
        "    probe.first_argmax = broken\n"
        "    try:\n"
        "        launch_one_row(cpu)\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True, timeout=100
    )
    assert "came out as [[2.0, 78.0]], not [[1.0, 77.0]]" in done.stdout
    assert "CompilationError: " in done.stdout


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where a launch must fail")
def test_launch_of_one_row_fails_without_a_device():
    """The real probe, uninterpreted, on a machine without a driver: the reason is one of triton's or torch's."""
    script = "import torch\nfrom kdtrain_kernels.dispatch import choice\nprint(*choice(torch.device('cuda', 0)))\n"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.startswith("torch a launch on cuda:0 fails with ")
