"""Checkpoints and processes: killed while saving, and reading where DeepSpeed does not exist."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdtrain.engine.checkpoint import find_latest, read_state
from tests.support import checkpoint_values as slices

ROOT = Path(__file__).resolve().parents[2]


def run(code, *args):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def save(root, *, behind, **settings):
    """One checkpoint by the plain write, or by a thread."""
    if not behind:
        return slices.write(root, **settings)
    from kdtrain.distributed.mesh import Mesh
    from kdtrain.engine.background import BackgroundWriter

    writer = BackgroundWriter(Mesh(), torch.device("cpu"))
    fragments = slices.fragments({}, slices.ragged)
    writer.begin(root, slices.about(**settings), fragments, dict.fromkeys(slices.SHAPES, 3))
    return writer.wait()


def save_until_killed(root, step, state_bytes, limit, behind):
    """In a child that the kernel kills when it writes byte `limit` of any one file; whether it was killed."""
    if child := os.fork():
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    code = 1
    try:
        save(root, behind=behind, step=step, state={"fill": "x" * state_bytes})
        code = 0
    finally:
        os._exit(code)


def kill_at_every_kind_of_byte(root, behind=False):
    good = slices.write(root, step=1, state={"good": True})
    size = (good / "rank_00000.safetensors").stat().st_size
    state_bytes = 3 * size  # so that checkpoint.json is the longer file, and the larger limits fall into it
    limits = [0, 1, 8, size // 2, size - 1, size, 2 * size, 3 * size]
    for limit in limits:
        assert save_until_killed(root, 2, state_bytes, limit, behind), limit
        assert (root / ".step_000002.writing").exists()
        assert find_latest(root) == good
        assert read_state(good) == {"good": True}
    assert not save_until_killed(root, 2, state_bytes, 10 * size, behind)
    assert sorted(p.name for p in root.iterdir()) == ["step_000001", "step_000002"]
    assert read_state(find_latest(root))["fill"] == "x" * state_bytes


LOAD = """
import pathlib, sys
from kdtrain.testing.ranks import load_file
test = load_file(sys.argv[1])
"""


@pytest.mark.parametrize("behind", [False, True])
def test_kill_at_any_byte_keeps_the_last_complete_checkpoint(tmp_path, behind):
    code = f"test.kill_at_every_kind_of_byte(pathlib.Path(sys.argv[2]), {behind})"
    run(LOAD + code, __file__, tmp_path)


def test_checkpoints_are_read_without_deepspeed(tmp_path):
    folder = slices.write(tmp_path, slices.LAYOUTS["three"])
    code = (
        "import sys, pathlib; sys.modules['deepspeed'] = None\n"
        "from kdtrain.engine import checkpoint\n"
        "import kdtrain.jobs.export_hf\n"
        "folder = checkpoint.find_latest(pathlib.Path(sys.argv[1]))\n"
        "print(folder.name, sum(float(t.sum()) for _, t in checkpoint.read_full_parameters(folder)))"
    )
    want = sum(float(slices.values(name, "master").sum()) for name in slices.SHAPES)
    assert run(code, tmp_path).split() == [folder.name, str(want)]
