"""A sequence longer than a model's positions is refused before a run; one beyond its trained length causes a
warning."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.config.cli import parse
from kdtrain.errors import ConfigError
from kdtrain.jobs.eval_model import run_evaluation
from kdtrain.jobs.train import run_training
from kdtrain.models.load import ModelSpec, parameters_on_meta
from kdtrain.models.positions import check_positions, positions_of
from kdtrain.models.tiny import tiny_config
from tests.support.tiny_data import random_documents, write_store
from tests.support.tiny_run import write_run

OPT = {"word_embed_proj_dim": 32, "ffn_dim": 44}
LEFT_OUT = ("model_type", "intermediate_size", "max_position_embeddings")
COMMON = {key: value for key, value in tiny_config("llama").items() if key not in LEFT_OUT}
ENDING = {
    "gpt2": ({"n_positions": 40}, 40),
    "gpt_bigcode": ({"n_positions": 40}, 40),
    "gptj": ({"n_positions": 40, "rotary_dim": 4}, 40),  # a table of sines, not of weights
    "gpt_neo": ({"max_position_embeddings": 40, "attention_types": [[["global"], 2]], "num_layers": 2}, 40),
    "ctrl": ({"n_positions": 40, "n_layer": 2, "n_head": 4, "n_embd": 32, "dff": 44}, 40),
    "opt": ({**OPT, "max_position_embeddings": 40}, 40),  # 42 rows: the first two are not positions
    "biogpt": ({"max_position_embeddings": 40}, 40),
    "bert": ({"max_position_embeddings": 40, "is_decoder": True}, 40),
    "mpt": ({"max_seq_len": 40, "d_model": 32, "n_layers": 2}, 40),  # ALiBi from a table, independent of position_ids
}
"""model_type -> (settings, positions)"""

ENDLESS = {
    "llama": {"max_position_embeddings": 40},
    "gpt_neox": {"max_position_embeddings": 40},
    "bloom": {"seq_length": 40, "n_layer": 2},
    "rwkv": {"context_length": 40, "attention_hidden_size": 32},
}


def on_meta(model_type, **settings):
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**COMMON, **settings}))


@pytest.mark.parametrize("model_type", ENDING)
def test_end_of_position_tables_is_measured(model_type):
    settings, size = ENDING[model_type]
    model = on_meta(model_type, **settings)
    assert positions_of(model, "it", size).end is None
    assert positions_of(model, "it", size + 1).end == size
    assert positions_of(model, "it", 3000).end == size


@pytest.mark.parametrize("model_type", ENDLESS)
def test_positions_without_an_end_are_only_declared(model_type):
    settings = ENDLESS[model_type]
    found = positions_of(on_meta(model_type, **settings), "it", 3000)
    assert found.end is None
    assert list(found.declared.values()) == [40]


@pytest.mark.parametrize("rope", ["dynamic", "yarn"])
def test_limit_in_rotary_settings_is_not_an_end(rope):
    more = {"original_max_position_embeddings": 10} if rope == "yarn" else {}
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0, **more}
    assert positions_of(on_meta("llama", max_position_embeddings=40, rope_parameters=parameters), "it", 300).end is None


GPT2 = tiny_config("gpt2", n_positions=16)
SHORT = tiny_config("llama", max_position_embeddings=16)
LONG = tiny_config("llama")


def request(path, *words, check=True):
    return parse([str(path), "run.name=it", *words, *(["--check"] if check else [])], None)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_model_with_too_few_positions_is_refused_by_run_and_check(tmp_path, role, check):
    models = {"student": LONG, "teacher": LONG, role: GPT2}
    path = write_run(tmp_path, steps=2, **models)
    words = ["data.seq_len=32", "data.sequences_per_micro_batch=2"]
    with pytest.raises(ConfigError) as refused:
        run_training(request(path, *words, check=check))
    name = tmp_path / ("student.json" if role == "student" else "teacher")
    assert str(refused.value).startswith(f"data.seq_len = 32 is more than the 16 positions of the {role} '{name}'\n")
    assert "position 15" in str(refused.value)
    assert "fix: set data.seq_len to 16 or less" in str(refused.value)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="the 16 positions"):
        run_training(request(path, *words, "data.reset_positions=false", check=check))


def test_sequences_as_long_as_the_table_pass(tmp_path, capsys):
    path = write_run(tmp_path, steps=2, student=GPT2, teacher=GPT2)
    assert run_training(request(path)) == 0
    printed = capsys.readouterr().out
    assert "check    passed" in printed
    assert "seq_len" not in printed


@pytest.mark.parametrize("role", ["student", "teacher", "student and teacher"])
def test_rotary_model_beyond_its_trained_length_warns_once_with_both_numbers(tmp_path, capsys, role):
    models = {"student": LONG, "teacher": LONG, **dict.fromkeys(role.split(" and "), SHORT)}
    path = write_run(tmp_path, steps=2, **models)
    assert run_training(request(path, "data.seq_len=32", "data.sequences_per_micro_batch=2")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "data.seq_len = 32" in line]
    assert len(lines) == len(role.split(" and "))
    for line, name in zip(lines, role.split(" and "), strict=True):
        assert f"more than the 16 positions that the {name} '" in line
        assert "(max_position_embeddings in its config)" in line


@pytest.mark.parametrize("check", [True, False])
def test_evaluation_refuses_too_few_positions(tmp_path, check):
    path = write_run(tmp_path, steps=2, student=LONG, teacher=GPT2)
    folder, store = tmp_path / "teacher", tmp_path / "held_out"
    write_store(store, random_documents(9, seed=1), folder)
    words = [f"student.weights={folder}", "student.architecture=null", f"data.validation={store}", "data.seq_len=32"]
    with pytest.raises(ConfigError, match=r"the 16 positions of the student '.*teacher'"):
        run_evaluation(request(path, *words, "data.sequences_per_micro_batch=2", check=check))


def test_random_state_of_torch_is_unchanged(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LONG))
    before = torch.get_rng_state()
    check_positions(ModelSpec(architecture=str(tmp_path)), "student", vocab_size=101, seq_len=64, trainable=True)
    assert torch.equal(torch.get_rng_state(), before)
