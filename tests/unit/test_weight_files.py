"""Weight files of a folder: those that transformers reads, or a refusal that names the contradicting files.

Every folder is both checked (as --check does) and loaded, and must fare alike.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kdtrain.errors import ConfigError
from kdtrain.models.export import export_hf
from kdtrain.models.tiny import save_random, tiny_config
from tests.support.model_folders import check_and_load, edit_json, edit_tensors

LLAMA = tiny_config("llama")
INDEX = "model.safetensors.index.json"


def head_of(folder):
    """The head's weight as transformers reads the folder, after comparing every other parameter."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, param in check_and_load(folder).hf_parameters():
        want = model.get_parameter(name)
        assert torch.equal(param[: len(want)], want), name
    return model.lm_head.weight


def refuse(folder, match):
    with pytest.raises(ConfigError, match=match) as caught:
        check_and_load(folder)
    assert "\n  fix: " in str(caught.value)


def sharded(folder, seed=1):
    save_random(folder, LLAMA, seed=seed, shard_size="20KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_old_shards_beside_a_newer_single_file_are_refused_and_both_are_named(tmp_path):
    shards = sharded(tmp_path / "a")
    save_random(tmp_path / "b", LLAMA, seed=2)
    shutil.copy(tmp_path / "b/model.safetensors", tmp_path / "a")
    refuse(tmp_path / "a", rf"two sets of weights: model\.safetensors and {shards[0].name} differ in 'model\.embed")


def test_new_shards_saved_over_an_old_single_file_are_refused_and_both_are_named(tmp_path):
    save_random(tmp_path, LLAMA, seed=2)
    shards = sharded(tmp_path)
    assert (tmp_path / "model.safetensors").is_file(), "save_pretrained leaves the old file, and transformers reads it"
    refuse(tmp_path, rf"two sets of weights: model\.safetensors and {shards[0].name} differ")
    (tmp_path / INDEX).unlink()
    refuse(tmp_path, rf"and {shards[0].name} differ[\s\S]*fix: remove model\.safetensors, or the shards")


def test_two_equal_sets_of_files_are_read(tmp_path):
    sharded(tmp_path, seed=2)
    save_random(tmp_path / "b", LLAMA, seed=2)
    shutil.copy(tmp_path / "b/model.safetensors", tmp_path)
    assert torch.equal(head_of(tmp_path), load_file(tmp_path / "model.safetensors")["lm_head.weight"])


def test_index_without_its_shards_does_not_hide_a_single_file(tmp_path):
    sharded(tmp_path, seed=1)
    save_random(tmp_path, LLAMA, seed=2)
    assert (tmp_path / INDEX).is_file(), "save_pretrained leaves the old index"
    assert not list(tmp_path.glob("model-*"))
    assert torch.equal(head_of(tmp_path), load_file(tmp_path / "model.safetensors")["lm_head.weight"])


def test_index_of_the_single_file_is_not_a_second_set(tmp_path):
    save_random(tmp_path, LLAMA)
    names = load_file(tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}))
    head_of(tmp_path)


def test_config_json_can_name_the_file_as_for_transformers(tmp_path):
    save_random(tmp_path, LLAMA, seed=1)
    save_random(tmp_path / "b", LLAMA, seed=2)
    shutil.copy(tmp_path / "b/model.safetensors", tmp_path / "other.safetensors")
    edit_json(tmp_path / "config.json", transformers_weights="other.safetensors")
    assert torch.equal(head_of(tmp_path), load_file(tmp_path / "other.safetensors")["lm_head.weight"])
    edit_json(tmp_path / "config.json", transformers_weights="gone.safetensors")
    refuse(tmp_path, r"lacks \['gone\.safetensors'\], named by transformers_weights")
    for wrong in ("../other.safetensors", "other.bin"):
        edit_json(tmp_path / "config.json", transformers_weights=wrong)
        refuse(tmp_path, "transformers_weights = ")


def test_files_may_be_links_as_in_a_cache_of_downloads(tmp_path):
    save_random(tmp_path / "blobs", LLAMA)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    head_of(tmp_path / "snapshot")
    edit_json(tmp_path / "blobs/config.json", transformers_weights="model.safetensors")
    head_of(tmp_path / "snapshot")


def test_an_export_of_a_model_whose_config_names_a_file_names_none(tmp_path):
    save_random(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    edit_json(tmp_path / "config.json", transformers_weights="other.safetensors")
    model = check_and_load(tmp_path)
    state = {name: param[: model.full_shapes()[name][0]] for name, param in model.hf_parameters()}
    folder = export_hf(state, model.config, tmp_path / "export", dtype=torch.float32)
    assert "transformers_weights" not in json.loads((folder / "config.json").read_text())
    assert torch.equal(head_of(folder), load_file(tmp_path / "other.safetensors")["lm_head.weight"])


def test_config_json_can_name_an_index(tmp_path):
    sharded(tmp_path)
    (tmp_path / INDEX).rename(tmp_path / "other.safetensors.index.json")
    refuse(tmp_path, "index of a sharded folder is missing")
    edit_json(tmp_path / "config.json", transformers_weights="other.safetensors.index.json")
    head_of(tmp_path)


def test_tensors_missing_from_the_index_are_read_as_in_transformers(tmp_path):
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    head_of(tmp_path)


def test_unindexed_shards_of_another_save_are_not_read(tmp_path, caplog):
    shards = sharded(tmp_path, seed=1)
    shutil.copy(shards[0], tmp_path / "model-00001-of-00099.safetensors")
    with caplog.at_level("INFO", logger="kdtrain"):
        head_of(tmp_path)
    assert "does not name ['model-00001-of-00099.safetensors']: not read" in caplog.text


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path):
    first, second, *_ = sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    name = next(iter(load_file(second)))
    index["weight_map"][name] = first.name
    (tmp_path / INDEX).write_text(json.dumps(index))
    refuse(tmp_path, rf"index\.json places '{name}' in {first.name}, which does not hold it")
    index["weight_map"] = {"nowhere": first.name, **index["weight_map"], name: second.name}
    (tmp_path / INDEX).write_text(json.dumps(index))
    refuse(tmp_path, rf"places 'nowhere' in {first.name}")


def test_a_tensor_in_two_shards_is_refused_if_they_differ(tmp_path):
    first, second, *_ = sharded(tmp_path)
    name, tensor = next(iter(load_file(second).items()))
    save_file({**load_file(first), name: tensor}, first)
    head_of(tmp_path)
    save_file({**load_file(first), name: tensor + 1}, first)
    refuse(tmp_path, rf"{first.name} and {second.name} hold two different tensors '{name}'")


def test_a_shard_that_is_cut_off_is_refused_before_anything_is_read(tmp_path):
    last = sharded(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[:-100])
    refuse(tmp_path, rf"{last.name} cannot be read(.|\n)*damaged or cut off")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": []}'])
def test_invalid_index_is_refused(tmp_path, content):
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(content)
    refuse(tmp_path, r"index\.json is damaged")


def test_distributed_checkpoints_and_adapters_are_refused(tmp_path):
    save_random(tmp_path, LLAMA)
    (tmp_path / "adapter_config.json").write_text("{}")
    refuse(tmp_path, r"holds an adapter \(adapter_config\.json\)(.|\n)*merge")
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "shard-00000-model-00001-of-00002.safetensors").touch()
    refuse(tmp_path, "holds a distributed checkpoint")


@pytest.mark.parametrize(("prefixed", "plain"), [("model.norm.weight", "norm.weight")])
def test_two_names_for_one_parameter_are_refused_if_they_differ(tmp_path, prefixed, plain):
    save_random(tmp_path, LLAMA)
    edit_tensors(tmp_path, lambda tensors: tensors.update({plain: tensors[prefixed].clone()}))
    head_of(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({plain: tensors[prefixed] + 1}))
    refuse(tmp_path, rf"two different tensors for parameter '{prefixed}': '{prefixed}' in .* and '{plain}' in")
