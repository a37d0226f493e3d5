"""Folders of checkpoints: complete or absent, found by step, replaced, retained and removed. No DeepSpeed."""

import json
import os
import shutil

import pytest
import torch

from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.checkpoint import Description, find_latest, read_state, retain, write_checkpoint
from kdtrain.engine.manifest import KINDS
from kdtrain.engine.slices import Fragment
from kdtrain.errors import CheckpointError


def write(root, *, step=7, state=None):
    """A checkpoint of one parameter with 16 elements."""
    about = Description(step, {"w": (4, 4)}, {}, {"tp": 1}, {"model_type": "none"}, state or {"tokens": 5})
    fragments = [Fragment("w", kind, 0, 0, torch.arange(16.0)) for kind in KINDS]
    return write_checkpoint(root, Mesh(), about, fragments, {"w": 3})


def test_root_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/root: \[Errno 20\]"):
        write(tmp_path / "file" / "root")


def test_saving_same_step_again_replaces_it_and_one_is_always_found(tmp_path):
    folder = write(tmp_path, state={"try": 1})
    assert write(tmp_path, state={"try": 2}) == folder
    assert read_state(folder) == {"try": 2}
    assert list(tmp_path.iterdir()) == [folder]
    # killed between the two renames: the former folder is retired, the new one does not exist yet
    retired = folder.rename(tmp_path / ".step_000007.replaced")
    assert find_latest(tmp_path) == retired
    assert write(tmp_path, state={"try": 3}) == folder
    # killed after them, before the former one was removed
    shutil.copytree(folder, retired)
    assert find_latest(tmp_path) == folder
    write(tmp_path, step=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000007", "step_000008"]


def test_newest_complete_checkpoint_is_found_and_damaged_ones_are_logged(tmp_path, caplog):
    assert find_latest(tmp_path / "nowhere") is None
    assert find_latest(tmp_path) is None
    for step in (999_999, 1_000_000, 5, 12):
        write(tmp_path, step=step)
    (tmp_path / "step_2000000").write_text("a file")
    (tmp_path / "step_3000000.bak").mkdir()
    assert find_latest(tmp_path).name == "step_1000000"
    assert not caplog.records
    os.truncate(tmp_path / "step_1000000" / "rank_00000.safetensors", 50)
    (tmp_path / "step_999999" / "checkpoint.json").unlink()
    assert find_latest(tmp_path).name == "step_000012"
    assert ["step_1000000" in caplog.messages[0], "step_999999" in caplog.messages[1]] == [True, True]
    manifest = tmp_path / "step_000012" / "checkpoint.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 9}))
    with pytest.raises(CheckpointError, match="newer kdtrain"):
        find_latest(tmp_path)


def test_retain_keeps_newest_complete_checkpoints_and_all_damaged_ones(tmp_path):
    for step in (1, 2, 3, 4, 5):
        newest = write(tmp_path, step=step)
    (tmp_path / "step_000004" / "checkpoint.json").unlink()
    (tmp_path / "notes").mkdir()
    retain(tmp_path, 9, just_saved=newest)
    assert len(list(tmp_path.iterdir())) == 6
    retain(tmp_path, 2, just_saved=newest)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step_000003", "step_000004", "step_000005"]
    retain(tmp_path, 1, just_saved=newest)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step_000004", "step_000005"]
    with pytest.raises(ValueError, match="at least 1"):
        retain(tmp_path, 0, just_saved=newest)
    with pytest.raises(ValueError, match="at least 1"):
        retain(tmp_path, 1, just_saved=newest, keep_every=0)
    retain(tmp_path / "nowhere", 1, just_saved=newest)


def test_retain_keeps_multiples_of_keep_every_besides_newest(tmp_path):
    for step in range(1, 11):
        newest = write(tmp_path, step=step)
        retain(tmp_path, 2, just_saved=newest, keep_every=4)
    assert sorted(int(p.name[5:]) for p in tmp_path.iterdir()) == [4, 8, 9, 10]
    retain(tmp_path, 1, just_saved=newest)
    assert sorted(int(p.name[5:]) for p in tmp_path.iterdir()) == [10], (
        "without keep_every those that it kept are removed"
    )


def test_retain_never_removes_checkpoint_just_saved(tmp_path):
    for step in (6, 8):
        write(tmp_path, step=step)
    fresh = write(tmp_path, step=1)
    retain(tmp_path, 1, just_saved=fresh)
    assert fresh.is_dir()
    for folder in tmp_path.glob("step_00000[68]"):
        for file in folder.glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-1])
    fresh = write(tmp_path, step=2)
    retain(tmp_path, 1, just_saved=fresh)
    assert find_latest(tmp_path) == fresh
