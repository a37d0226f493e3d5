"""Settings of a process: the order of NCCL's kernels, deterministic algorithms, threads for work on the host."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kdtrain.engine import bootstrap
from kdtrain.engine.process import compute_deterministically, host_threads, order_nccl_launches
from kdtrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"


def test_nccl_launch_order_is_set_unless_user_has_set_it(logged):
    fresh, chosen = {}, {ORDER: "0"}
    order_nccl_launches(fresh)
    order_nccl_launches(chosen)
    assert (fresh, chosen) == ({ORDER: "1"}, {ORDER: "0"})
    assert [ORDER in record.message for record in logged.records] == [True, True]
    assert "= 0, from the environment" in logged.records[1].message


class Joined(Exception):
    """Raised instead of making the process group."""


def joins(monkeypatch, *, cuda):
    """The environment at the moment when a rank makes its process group."""
    seen = {}

    def init_process_group(backend, **_):
        seen.update(os.environ, backend=backend)
        raise Joined

    monkeypatch.delenv(ORDER, raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    with pytest.raises(Joined):
        bootstrap.start()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return seen


def test_launch_order_is_set_before_first_communicator_and_only_on_cuda(monkeypatch):
    seen = joins(monkeypatch, cuda=True)
    assert (seen["backend"], seen[ORDER]) == ("nccl", "1")
    seen = joins(monkeypatch, cuda=False)
    assert seen["backend"] == "gloo"
    assert ORDER not in seen


@pytest.mark.parametrize(
    ("name", "value"), [("FLASH_ATTENTION_DETERMINISTIC", "0"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0")]
)
def test_an_environment_that_contradicts_deterministic_algorithms_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"debug.deterministic = true, but {name} = '{value}'"):
        compute_deterministically({name: value})
    assert not torch.are_deterministic_algorithms_enabled()


DETERMINISTIC = """
import os, torch
from kdtrain.engine.process import compute_deterministically
environ = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
compute_deterministically(environ)
assert environ == {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}, environ
assert torch.are_deterministic_algorithms_enabled()
assert not torch.is_deterministic_algorithms_warn_only_enabled()
try:  # an operation that has no deterministic form, on the CPU too
    torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
except RuntimeError as error:
    print(error)
"""


def test_deterministic_setting_makes_torch_refuse_other_operations():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", DETERMINISTIC], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "does not have a deterministic implementation" in done.stdout


CORES = set(range(8))
TORCHRUN = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("mine", "masks", "environ", "threads"),
    [
        (CORES, [CORES], {}, 8),
        (CORES, [CORES] * 3, {}, 2),
        (CORES, [CORES] * 16, {}, 1),
        (CORES, [CORES] * 2, TORCHRUN, 4),
        ({0, 1, 2, 3}, [{0, 1, 2, 3}, {4, 5, 6, 7}], {}, 4),
        ({0, 1, 2, 3}, [{0, 1, 2, 3}, CORES], {}, 2),
        (CORES, [CORES] * 2, {"OMP_NUM_THREADS": "6"}, None),
        (CORES, [CORES] * 2, {**TORCHRUN, "OMP_NUM_THREADS": "2"}, None),
        (CORES, [CORES] * 2, {"OMP_NUM_THREADS": "1"}, None),
    ],
)
def test_threads_are_part_of_cores_unless_set_by_user(mine, masks, environ, threads):
    assert host_threads(mine, masks, environ) == threads
