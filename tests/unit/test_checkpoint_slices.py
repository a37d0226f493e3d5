"""The checkpoint format: any layout reads any layout, and damage of every kind is refused. No DeepSpeed."""

import json
import os
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.checkpoint import (
    find_latest,
    read_full_parameters,
    read_state,
    write_checkpoint,
)
from kdtrain.engine.manifest import KINDS, FileEntry, Manifest, Slice
from kdtrain.engine.slices import CheckpointReader, Fragment, write_rank_file
from kdtrain.errors import EXIT_DATA, CheckpointError
from kdtrain.parallel.shard_tensors import split_tensor
from tests.support.checkpoint_values import LAYOUTS, SHAPES, about, fragments, ragged, values, write, write_scattered


@pytest.mark.parametrize("saved", LAYOUTS)
def test_every_layout_reads_every_layout(tmp_path, saved):
    with CheckpointReader(write_scattered(tmp_path / "step_000007", LAYOUTS[saved])) as reader:
        reader.verify()
        assert reader.names() == list(SHAPES)
        for name in SHAPES:
            for kind in KINDS:
                assert torch.equal(reader.read_full(name, kind), values(name, kind))
                for cuts in LAYOUTS.values():
                    cut = cuts.get(name)
                    for tp_rank in range(1 if cut is None else cut.tp_size):
                        want = split_tensor(values(name, kind), cut, tp_rank)
                        got = reader.read_shard(name, kind, cut, tp_rank)
                        assert got.shape == want.shape
                        assert torch.equal(got, want), (name, cut, tp_rank)


@pytest.mark.parametrize("saved", LAYOUTS)
def test_range_equals_part_of_padded_shard_and_zeros_past_its_end(tmp_path, saved):
    with CheckpointReader(write_scattered(tmp_path / "step_000007", LAYOUTS[saved])) as reader:
        for name in SHAPES:
            for cuts in LAYOUTS.values():
                cut = cuts.get(name)
                for tp_rank in range(1 if cut is None else cut.tp_size):
                    flat = split_tensor(values(name, "exp_avg"), cut, tp_rank).flatten()
                    flat = torch.cat([flat, torch.zeros(4)])  # ZeRO-3 pads once more
                    for start, stop in ((0, len(flat)), (3, 8), (5, 5), (len(flat) - 6, len(flat))):
                        start, stop = max(start, 0), min(stop, len(flat))
                        if start <= stop:
                            got = reader.read_range(name, "exp_avg", cut, tp_rank, start, stop)
                            assert torch.equal(got, flat[start:stop]), (name, cut, tp_rank, start, stop)


def test_a_saved_folder_is_plain_safetensors_and_json(tmp_path):
    folder = write(tmp_path / "runs" / "checkpoints", LAYOUTS["two"], state={"rng": "00ff", "share": 0.1})
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.json", "rank_00000.safetensors"]
    tensors = load_file(folder / "rank_00000.safetensors")
    assert torch.equal(tensors["embed.weight|exp_avg|1|0"], values("embed.weight", "exp_avg")[8:].flatten()[:1])
    found = json.loads((folder / "checkpoint.json").read_text())
    assert found["parameters"]["embed.weight"] == {
        "shape": [11, 6],
        "cut": {"dim": 0, "pieces": [[0, 8], [8, 11]]},
        "adam_step": 3,
    }
    assert read_state(folder) == {"rng": "00ff", "share": 0.1}
    assert find_latest(tmp_path / "runs" / "checkpoints") == folder
    full = dict(read_full_parameters(folder))
    assert list(full) == list(SHAPES)
    assert all(torch.equal(full[name], values(name, "master")) for name in SHAPES)


def test_equal_models_have_equal_fingerprints_in_any_layout(tmp_path):
    one, two = (Manifest.read(write(tmp_path, LAYOUTS[k], step=s)) for s, k in enumerate(("whole", "three")))
    other = write_checkpoint(tmp_path, Mesh(), replace(about(step=9), config={"a": 1}), fragments({}), {})
    assert one.fingerprint == two.fingerprint != Manifest.read(other).fingerprint


def edit(folder, change):
    path = folder / "checkpoint.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def drop_a_slice(found):
    found["files"]["rank_00000.safetensors"]["slices"].pop(5)


def repeat_a_slice(found):
    found["files"]["rank_00000.safetensors"]["slices"].append(["norm.weight", "master", 0, 0, 6])


def unknown_slice(found):
    found["files"]["rank_00000.safetensors"]["slices"].append(["other", "master", 0, 0, 6])


def slice_of_a_rank_too_many(found):
    found["files"]["rank_00000.safetensors"]["slices"].append(["norm.weight", "master", 1, 0, 6])


def pieces_with_a_hole(found):
    found["parameters"]["o_proj.weight"]["cut"]["pieces"] = [[0, 4], [5, 9]]


def file_outside(found):
    found["files"]["../x"] = found["files"]["rank_00000.safetensors"]


def version_three(found):
    found["version"] = 3


def without_layout(found):
    del found["layout"]


IN_JSON = {
    drop_a_slice: "leave a gap or overlap|cover [0-9]+ of",
    repeat_a_slice: "leave a gap or overlap",
    unknown_slice: "other.master.0.0.*not a parameter of this checkpoint",
    slice_of_a_rank_too_many: "tp rank 1, which did not exist",
    pieces_with_a_hole: "do not partition",
    file_outside: "plain file name",
    version_three: "format version 3, this kdtrain reads up to 2",
    without_layout: "KeyError 'layout'",
}
DAMAGE = {
    "other json": (lambda f: (f / "checkpoint.json").write_text("[1]"), "not a kdtrain-checkpoint"),
    "cut json": (lambda f: os.truncate(f / "checkpoint.json", 200), "checkpoint.json: cannot be read"),
    "no json": (lambda f: (f / "checkpoint.json").unlink(), "written last"),
    "no file": (lambda f: (f / "rank_00000.safetensors").unlink(), "rank_00000.safetensors: cannot be found: .Errno 2"),
    "cut file": (
        lambda f: os.truncate(f / "rank_00000.safetensors", 100),
        "rank_00000.safetensors: has 100 bytes, [0-9]+ were written",
    ),
    **{change.__name__: (lambda f, c=change: edit(f, c), message) for change, message in IN_JSON.items()},
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_with_file_and_reason(tmp_path, kind):
    folder = write(tmp_path, LAYOUTS["two"])
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as refused:
        CheckpointReader(folder)
    assert str(folder) in str(refused.value)
    assert "\n  fix: " in str(refused.value)
    assert refused.value.exit_code == EXIT_DATA


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_anywhere_fails_the_checksum(tmp_path):
    folder = write(tmp_path)
    path = folder / "rank_00000.safetensors"
    for at in (0, 20, path.stat().st_size // 2, path.stat().st_size - 1):
        flip(path, at)
        with CheckpointReader(folder) as reader, pytest.raises(CheckpointError, match=r"has sha256 [0-9a-f]{64}, "):
            reader.verify()
        with pytest.raises(CheckpointError, match="has sha256"):
            list(read_full_parameters(folder))
        flip(path, at)
    list(read_full_parameters(folder))


def test_file_with_content_of_another_rank_is_refused_when_read(tmp_path):
    folder = write_scattered(tmp_path / "step_000001", LAYOUTS["whole"])
    first, second = folder / "rank_00000.safetensors", folder / "rank_00001.safetensors"
    shutil.copy(second, first)
    edit(folder, lambda m: m["files"][first.name].update(size=first.stat().st_size))
    with CheckpointReader(folder) as reader, pytest.raises(CheckpointError, match="cannot be read"):
        reader.read_full("embed.weight", "master")


def test_a_save_that_does_not_cover_the_model_is_not_completed(tmp_path):
    good = write(tmp_path, step=1)
    short = [f for f in fragments({}, ragged) if (f.name, f.offset) != ("norm.weight", 3)]
    with pytest.raises(CheckpointError, match=r"step_000002 was not saved.*norm.weight.*cover 3 of 6"):
        write_checkpoint(tmp_path, Mesh(), about(step=2), short, {})
    assert list(tmp_path.iterdir()) == [good]


def test_state_that_is_not_json_raises_before_writing(tmp_path):
    with pytest.raises(TypeError, match="bytes"):
        write(tmp_path / "root", state={"rng": b"12"})
    assert not (tmp_path / "root").exists()


def test_fragments_must_be_flat_float32_and_distinct(tmp_path):
    with pytest.raises(ValueError, match=r"1-D float32, got torch\.bfloat16"):
        write_rank_file(tmp_path / "a", [Fragment("a", "master", 0, 0, torch.zeros(3, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match="two fragments"):
        write_rank_file(tmp_path / "a", [Fragment("a", "master", 0, 0, torch.zeros(3))] * 2)
    entry = write_rank_file(tmp_path / "a", [Fragment("a", "master", 0, 4, torch.arange(8.0)[::2])])
    assert entry == FileEntry("a", (tmp_path / "a").stat().st_size, entry.sha256, (Slice("a", "master", 0, 4, 4),))
    assert load_file(tmp_path / "a")["a|master|0|4"].tolist() == [0.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize("limit", [0, 7, 100, 2000, 4000])
def test_full_disk_raises_with_file_and_errno_and_keeps_former_checkpoints(tmp_path, limit):
    good = write(tmp_path, step=1)
    size = (good / "rank_00000.safetensors").stat().st_size
    assert limit < size
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step_000002 was not saved: rank 0: .*\[Errno 27\] File too large"):
            write(tmp_path, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == [good]
    assert find_latest(tmp_path) == good


def test_two_saves_of_equal_state_are_equal_bytes_without_metadata(tmp_path):
    def made(name):
        path = tmp_path / name
        entry = write_rank_file(path, fragments(LAYOUTS["two"]))
        return path.read_bytes(), entry

    (first, entry), (second, again) = made("a"), made("b")
    assert first == second
    assert entry.sha256 == again.sha256
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    assert "__metadata__" not in header  # safetensors 0.8 writes several keys there in random order
    for cuts in LAYOUTS.values():
        assert write_rank_file(tmp_path / "a", fragments(cuts)) == write_rank_file(tmp_path / "a", fragments(cuts))
