"""Configs that transformers writes but cannot read back, and configs that it rejects."""

import json
import math
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.errors import ConfigError
from kdtrain.models.export import export_hf
from kdtrain.models.head import load_head
from kdtrain.models.load import ModelSpec, load_backbone, model_info
from kdtrain.models.positions import check_positions
from kdtrain.models.stock import stock_settings
from kdtrain.models.tiny import save_random, tiny_config
from tests.support.model_folders import check_and_load, edit_json

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8}
INFINITE = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    "bamba": {**MAMBA, "attn_layer_indices": [1], "num_attention_heads": 4, "num_key_value_heads": 2},
}
"""Whose time_step_limit ends at infinity."""


@pytest.mark.parametrize("model_type", INFINITE)
def test_a_config_with_an_infinite_number_is_read_and_exported(tmp_path, model_type):
    """config.json and checkpoints keep the number as an object, which transformers' own classes reject."""
    config = AutoConfig.for_model(
        model_type, vocab_size=101, hidden_size=32, num_hidden_layers=2, intermediate_size=44, **INFINITE[model_type]
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "published")
    kept = json.loads(model.config.to_json_string(use_diff=False))  # as in a checkpoint
    assert kept["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    exported = export_hf(model.named_parameters(), kept, tmp_path / "exported", dtype=torch.float32)
    assert AutoConfig.from_pretrained(exported).time_step_limit[1] == math.inf
    for folder in (tmp_path / "published", exported):
        spec = ModelSpec(weights=str(folder), dtype="float32")
        backbone = load_backbone(spec, Mesh(), vocab_size=101, trainable=True, packed=False)
        assert backbone.config.time_step_limit[1] == math.inf
        found = {name: param[: backbone.full_shapes()[name][0]] for name, param in backbone.hf_parameters()}
        assert all(torch.equal(found[name], param) for name, param in model.named_parameters())


def test_only_the_three_numbers_that_json_lacks_are_decoded():
    settings = {"a": [{"__float__": "-Infinity"}], "b": {"c": {"__float__": "NaN"}}, "d": {"__float__": "x"}, "e": [1]}
    found = stock_settings(settings)
    assert (found["a"], found["d"], found["e"]) == ([-math.inf], {"__float__": "x"}, [1])
    assert math.isnan(found["b"]["c"])


@pytest.mark.parametrize(
    "settings",
    [
        {"pad_token_id": 101},
        {"dtype": "torch.float16"},
        {"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}},
        {"num_key_value_heads": 0},
    ],
    ids=str,
)
def test_settings_rejected_by_transformers_are_refused_with_folder_and_reason(tmp_path, settings):
    """It fails on them with bare assertions, attribute, key and arithmetic errors, mostly once it makes layers."""
    save_random(tmp_path, tiny_config("llama"))
    edit_json(tmp_path / "config.json", **settings)
    spec = ModelSpec(weights=str(tmp_path), dtype="float32")
    for work in (
        lambda: check_positions(spec, "student", vocab_size=99, seq_len=8, trainable=True),
        lambda: model_info(spec, 99),
        lambda: check_and_load(tmp_path),
        lambda: load_head(spec, VocabShard.of(99)),
    ):
        with pytest.raises(ConfigError, match=rf"{re.escape(str(tmp_path))}.*: transformers refuses its config\.json"):
            work()
