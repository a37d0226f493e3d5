"""Checkpoints written in the background: bytes and errors of the synchronous write. One process."""

import resource
import threading
from dataclasses import replace

import pytest
import torch

from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import background
from kdtrain.engine.background import BackgroundWriter, Snapshot
from kdtrain.engine.checkpoint import find_latest, read_state
from kdtrain.engine.commit import remove_older
from kdtrain.engine.slices import Fragment
from kdtrain.errors import CheckpointError
from tests.support import checkpoint_values as slices

CPU = torch.device("cpu")


def begin(writer, root, *, step=7, state=None, fragments=None, **settings):
    fragments = slices.fragments({}, slices.ragged) if fragments is None else fragments
    return writer.begin(root, slices.about({}, step, state), fragments, dict.fromkeys(slices.SHAPES, 3), **settings)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("block", [4, 20, background.BLOCK_BYTES])
def test_bytes_equal_synchronous_write_after_sources_change(tmp_path, monkeypatch, block):
    monkeypatch.setattr(background, "BLOCK_BYTES", block)
    plain = slices.write(tmp_path / "plain", state={"tokens": [1]})
    state = {"tokens": [1]}
    fragments = [replace(f, tensor=f.tensor.clone()) for f in slices.fragments({}, slices.ragged)]
    writer = BackgroundWriter(Mesh(), CPU)
    path = begin(writer, tmp_path / "behind", state=state, fragments=fragments)
    for fragment in fragments:
        fragment.tensor.fill_(-1.0)  # the next optimizer step
    state["tokens"].append(2)
    assert writer.in_flight == path == tmp_path / "behind" / plain.name
    assert writer.wait() == path
    assert writer.in_flight is None
    assert contents(path) == contents(plain)
    assert writer.host_bytes == sum(4 * f.tensor.numel() for f in fragments)


ON_CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_host_memory_is_reused_and_grows_only_when_needed(device):
    held = Snapshot(torch.device(device))
    assert list(held.data()) == []
    for size in (5, 3, 0, 6):
        held.take([Fragment("a", "master", 0, 0, torch.arange(float(size), device=device))])
        assert b"".join(held.data()) == torch.arange(float(size)).numpy().tobytes()
        assert held.num_bytes == 4 * max(5, size)


def test_stages_advance_only_on_call_and_second_save_is_refused(tmp_path):
    gate, tidied = threading.Event(), []
    writer = BackgroundWriter(Mesh(), CPU)
    assert writer.advance() is None

    def prune(saved):
        gate.wait(30)
        tidied.append(saved)

    path = begin(writer, tmp_path, prune=prune)
    with pytest.raises(RuntimeError, match="still being written; wait for it first"):
        begin(writer, tmp_path, step=8)
    assert not path.exists(), "rank 0 alone must not make a checkpoint of files that others still write"
    assert writer.advance() is None
    assert writer.advance() is None
    assert writer.busy
    assert find_latest(tmp_path) == path, "the third stage tidies up behind a checkpoint that exists"
    gate.set()
    assert writer.advance() == path
    assert (writer.busy, writer.advance(), tidied) == (False, None, [path])
    assert begin(writer, tmp_path, step=8).name == "step_000008"
    writer.wait()


def test_full_disk_raises_as_synchronous_write_and_keeps_former_checkpoint(tmp_path):
    writer = BackgroundWriter(Mesh(), CPU)
    good = begin(writer, tmp_path, step=1, state={"good": True})
    writer.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(CheckpointError) as plain:
            slices.write(tmp_path, step=2)
        begin(writer, tmp_path, step=2)
        with pytest.raises(CheckpointError) as behind:
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    messages = [str(plain.value), str(behind.value)]
    assert messages[0] == messages[1]
    assert "step_000002 was not saved: rank 0: " in messages[0]
    assert "[Errno 27] File too large" in messages[0]
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    assert read_state(find_latest(tmp_path)) == {"good": True}
    assert writer.in_flight is None
    begin(writer, tmp_path, step=3)
    assert writer.wait().name == "step_000003", "it can be tried again"


def test_failed_pruning_raises_and_new_checkpoint_is_kept(tmp_path):
    for step in (1, 2):
        slices.write(tmp_path, step=step)
    writer = BackgroundWriter(Mesh(), CPU)

    def prune(saved):
        (tmp_path / ".step_000001.removing").write_text("no folder can be renamed to this")
        remove_older(tmp_path, 1, None, saved)

    begin(writer, tmp_path, step=3, prune=prune)
    with pytest.raises(CheckpointError, match=r"was not pruned: rank 0: .*cannot be removed: (.|\n)*fix: remove it"):
        writer.wait()
    assert find_latest(tmp_path).name == "step_000003"
