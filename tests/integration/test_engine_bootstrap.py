"""Ranks as processes: without a launcher, in a world of two, without a compiler, and their exit."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kdtrain.engine.bootstrap import collective_timeout, device_index
from kdtrain.errors import EXIT_STOPPED, ConfigError
from kdtrain.models.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "DEEPSPEED_TIMEOUT")

TRAIN = """
import pathlib, sys, torch
from kdtrain.engine import bootstrap
with bootstrap.runtime() as rank:
    from kdtrain.config.schema import OptimSection, ZeroSection
    from kdtrain.batch import Batch
    from kdtrain.distributed.mesh import Mesh
    from kdtrain.engine.settings import EngineSettings
    from kdtrain.engine.zero import StudentEngine
    from kdtrain.losses import linear_cross_entropy
    from kdtrain.models.load import ModelSpec, load_backbone
    mesh = Mesh.build(rank.world_size)
    spec = ModelSpec(architecture=sys.argv[1], attention="sdpa")
    backbone = load_backbone(spec, mesh, vocab_size=101, trainable=True)
    settings = EngineSettings(ZeroSection(stage=int(sys.argv[2])), OptimSection(), "bfloat16", 8)
    engine = StudentEngine(backbone, mesh, settings, device=rank.device)
    ids = torch.arange(24).reshape(2, 12)
    batch = Batch(ids, ids + 1, torch.ones(2, 12), torch.arange(12).expand(2, -1), torch.arange(2))
    def head_fn(hidden, head):
        return linear_cross_entropy(hidden, head, batch.labels.flatten(), weight=torch.ones(24),
                                    shard=backbone.shard, group=mesh.tp_group)
    engine.backward(engine(batch, head_fn).loss, 24)
    print(f"rank {rank.rank} of {rank.world_size}: {engine.step(1e-3)}")
bootstrap.exit_process(0)
"""


def start(code, *args, **variables):
    """A process with no launcher's variables but `variables`, with no compiler on its PATH."""
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "PATH": "/nonexistent", **variables}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def architecture(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config("qwen3")))
    return path


@pytest.mark.deepspeed
def test_one_process_trains_without_launcher_compiler_or_port(architecture, tmp_path):
    builds = tmp_path / "extensions"
    builds.mkdir()
    code, out, err = finish(start(TRAIN, architecture, 1, TORCH_EXTENSIONS_DIR=str(builds)))
    assert code == 0, err
    assert out.startswith("rank 0 of 1: StepResult(grad_norm=")
    assert out.endswith("applied=True)\n")
    assert out.count("\n") == 1, "DeepSpeed is to be quiet"
    assert list(builds.iterdir()) == [], "something was compiled"
    assert "FutureWarning" not in err
    assert "[INFO]" not in err, "DeepSpeed is to be quiet"


@pytest.mark.deepspeed
def test_two_ranks_join_from_launcher_variables(architecture):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(TRAIN, architecture, 3, RANK=str(r), LOCAL_RANK=str(r), **world) for r in range(2)]
    answers = [finish(process) for process in ranks]
    assert [code for code, _, _ in answers] == [0, 0], answers
    results = [out.partition(": ")[2] for _, out, _ in answers]
    assert results[0] == results[1]
    assert "rank 1 of 2: StepResult" in answers[1][1]


def test_exit_process_flushes_output_and_exits_with_its_code():
    code = (
        "import atexit, sys\nfrom kdtrain.engine import bootstrap\n"
        "atexit.register(lambda: print('torn down'))\n"
        "sys.stdout.write('output')\nbootstrap.exit_process(75)\n"
    )
    assert finish(start(code))[:2] == (EXIT_STOPPED, "output")


def test_world_without_master_address_is_refused(monkeypatch):
    from kdtrain.engine import bootstrap

    for name in LAUNCHER[:5]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 8 in the environment, but MASTER_ADDR is not set"):
        bootstrap.start()


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 4, 0), (3, 4, 3), (3, 1, 0)])
def test_rank_takes_its_own_device_or_the_only_visible_one(local_rank, visible, index):
    assert device_index(local_rank, visible) == index


def test_more_ranks_than_devices_are_refused():
    with pytest.raises(ConfigError, match="local rank 4 finds 4 CUDA devices"):
        device_index(4, 4)


def test_collective_timeout_is_read_from_the_environment(monkeypatch):
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    assert collective_timeout().total_seconds() == 3600
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "15")
    assert collective_timeout().total_seconds() == 900
    for wrong in ("soon", "-1", "0", "inf", "nan", "1.5", "10000000"):  # DeepSpeed would end with a ValueError
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", wrong)
        with pytest.raises(ConfigError, match="is not a whole number of minutes"):
            collective_timeout()
