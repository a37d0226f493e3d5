"""Loading and exporting in one process: what is read, in which dtype, and the errors."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import kdtrain.models
from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError, ParallelError
from kdtrain.models.architectures import ARCHITECTURES, read_architecture
from kdtrain.models.export import export_hf
from kdtrain.models.load import ModelSpec, build_config, load_backbone, model_rows, parameters_on_meta
from kdtrain.models.tiny import TINY, tiny_config
from kdtrain.stores.folders import recover_folder, replacing_folder
from tests.support.tiers import slow_cases


def write_folder(folder, name="llama", *, shard_size="1GB", **changes):
    """A stock model's folder; returns the model."""
    settings = tiny_config(name, **changes)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def load(folder, **changes):
    spec = ModelSpec(weights=str(folder), dtype=changes.pop("dtype", "float32"))
    return load_backbone(spec, Mesh(), **{"vocab_size": 99, "trainable": False, **changes})


def batch_of(ids):
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return Batch(ids, ids, torch.ones(ids.shape), positions, torch.arange(ids.shape[0]))


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_is_read_exactly(tmp_path, name, tied):
    model = write_folder(tmp_path, name, tie_word_embeddings=tied)
    backbone = load(tmp_path)
    want = dict(model.named_parameters())
    got = dict(backbone.hf_parameters())
    assert list(got) == list(want)
    for key, param in got.items():
        rows = backbone.cuts[key].full_size if key in backbone.cuts else None
        assert torch.equal(param[:rows], want[key]), key
    assert backbone.elements_read == sum(param.numel() for param in want.values())
    assert backbone.shard.vocab_size == 99
    assert backbone.lm_head_shard.weight.shape == (128, model.config.hidden_size)
    ids = torch.randint(0, 99, (1, 9))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(backbone.hidden_states(batch_of(ids)), hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("attention", "found"), [("auto", "packed"), ("eager", "eager")])
def test_an_architecture_without_sdpa_is_loaded_with_what_it_can_use(tmp_path, attention, found):
    settings = {**tiny_config("llama"), "model_type": "gemma2", "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    spec = ModelSpec(architecture=str(tmp_path), attention=attention)
    backbone = load_backbone(spec, Mesh(), vocab_size=99, trainable=False)
    assert backbone.config._attn_implementation == found


def test_a_folder_in_several_files_is_read_through_its_index(tmp_path):
    model = write_folder(tmp_path, shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for key, param in load(tmp_path).hf_parameters():
        assert torch.equal(param[: model.get_parameter(key).shape[0]], model.get_parameter(key)), key


def test_weights_take_the_dtype_and_rope_frequencies_stay_float32(tmp_path):
    model = write_folder(tmp_path)
    backbone = load(tmp_path, dtype="bfloat16")
    assert {param.dtype for param in backbone.parameters()} == {torch.bfloat16}
    rope = backbone.model.model.rotary_emb
    assert rope.inv_freq.dtype == torch.float32
    assert torch.equal(rope.inv_freq, model.model.rotary_emb.inv_freq)
    assert not any(param.requires_grad for param in backbone.parameters())
    assert not backbone.training


def test_total_rows_may_exceed_the_models_own(tmp_path):
    write_folder(tmp_path)
    backbone = load(tmp_path, total_rows=300)
    assert backbone.lm_head_shard.weight.shape[0] == backbone.shard.rows == 384
    assert not backbone.lm_head_shard.weight[101:].any()
    assert backbone.full_shapes()["lm_head.weight"] == (101, 32)


def test_random_initialisation_depends_on_the_seed_alone():
    spec = partial(ModelSpec, architecture="llama-5m", dtype="float32")
    before = torch.get_rng_state()
    one, again, other = (
        load_backbone(spec(seed=seed), Mesh(), vocab_size=512, trainable=True).lm_head_shard.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state was disturbed"
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    low = load_backbone(ModelSpec(architecture="llama-5m"), Mesh(), vocab_size=512, trainable=True)
    assert torch.equal(low.lm_head_shard.weight, one.to(torch.bfloat16))
    assert low.training
    assert all(param.requires_grad for param in low.parameters())


def test_activation_checkpointing_reaches_every_layer():
    spec = ModelSpec(architecture="llama-5m", activation_checkpointing=True)
    layers = load_backbone(spec, Mesh(), vocab_size=512, trainable=True).model.model.layers
    assert all(layer.gradient_checkpointing for layer in layers)


def test_buffers_are_real_while_parameters_are_on_meta():
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **tiny_settings("llama")))
    assert all(param.is_meta for param in model.parameters())
    assert model.model.rotary_emb.inv_freq.device.type == "cpu"
    assert not torch.nn.Linear(2, 2).weight.is_meta


def tiny_settings(name):
    return {key: value for key, value in tiny_config(name).items() if key != "model_type"}


def refuse(match, spec, error=ConfigError, **changes):
    with pytest.raises(error, match=match):
        load_backbone(spec, Mesh(), **{"vocab_size": 99, "trainable": False, **changes})


def test_a_missing_folder_is_refused(tmp_path):
    refuse("does not exist(.|\n)*never downloads", ModelSpec(weights=str(tmp_path / "none")))


def test_a_folder_without_config_is_refused(tmp_path):
    refuse(r"no config\.json", ModelSpec(weights=str(tmp_path)))


def test_stored_head_of_a_tied_model_must_equal_the_embedding(tmp_path, monkeypatch):
    monkeypatch.setattr("kdtrain.models.weight_files.COMPARED_ROWS", 8)
    model = write_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    match = r"ties 'lm_head\.weight' to 'model\.embed_tokens\.weight'(.|\n)*tie_word_embeddings=false"
    refuse(match, ModelSpec(weights=str(tmp_path)))
    state = load_file(tmp_path / "model.safetensors")
    nearly = state["model.embed_tokens.weight"].clone()
    nearly[-1, -1] += 1
    save_file({**state, "lm_head.weight": nearly}, tmp_path / "model.safetensors")
    refuse(match, ModelSpec(weights=str(tmp_path)))
    save_file({**state, "lm_head.weight": nearly[:99].clone()}, tmp_path / "model.safetensors")
    refuse(match, ModelSpec(weights=str(tmp_path)))
    same = state["model.embed_tokens.weight"].clone()
    save_file({**state, "lm_head.weight": same}, tmp_path / "model.safetensors")
    backbone = load(tmp_path)
    assert torch.equal(backbone.lm_head_shard.weight[:101], model.model.embed_tokens.weight)
    assert backbone.elements_read == sum(p.numel() for p in model.parameters()) - same.numel()


def test_a_folder_with_pickled_weights_only_is_refused(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refuse(r"only \['pytorch_model\.bin'\](.|\n)*save_pretrained", ModelSpec(weights=str(tmp_path)))


def test_a_cut_off_file_is_refused(tmp_path):
    write_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refuse("damaged or cut off", ModelSpec(weights=str(tmp_path)))


def test_a_missing_part_of_several_is_refused_by_name(tmp_path):
    write_folder(tmp_path, shard_size="20KB")
    part = sorted(tmp_path.glob("*.safetensors"))[1]
    part.unlink()
    refuse(f"lacks .*{part.name}", ModelSpec(weights=str(tmp_path)))


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    write_folder(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    refuse(r"no tensor for parameter 'model\.norm\.weight'", ModelSpec(weights=str(tmp_path)))


def test_weights_of_another_shape_are_refused(tmp_path):
    write_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    refuse(r"has shape \(44, 32\), the model needs \(40, 32\)", ModelSpec(weights=str(tmp_path)))


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(tmp_path):
    write_folder(tmp_path)
    refuse("vocab_size = 101, but the tokenizer has 102 tokens", ModelSpec(weights=str(tmp_path)), vocab_size=102)
    assert model_rows(ModelSpec(weights=str(tmp_path)), 99) == 101
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refuse("vocab_size = None, not a whole number", ModelSpec(weights=str(tmp_path)))


def test_a_model_that_is_not_causal_or_is_quantised_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 200}))
    refuse("not a causal language model", ModelSpec(weights=str(tmp_path)))
    quantised = {**tiny_config("llama"), "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    refuse("is quantised", ModelSpec(weights=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    refuse("not valid JSON", ModelSpec(weights=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nosuch", "vocab_size": 200}))
    refuse("transformers refuses", ModelSpec(weights=str(tmp_path)))


def test_both_or_neither_source_and_an_unknown_name_or_dtype_are_refused(tmp_path):
    refuse("exactly one", ModelSpec())
    refuse("exactly one", ModelSpec(weights="a", architecture="b"))
    refuse("known names: llama-5m", ModelSpec(architecture="lama-5m"))
    refuse("dtype = 'float16'", ModelSpec(architecture="llama-5m", dtype="float16"))


def test_dropout_with_tensor_parallelism_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama", attention_dropout=0.1)))
    with pytest.raises(ParallelError, match="attention_dropout"):
        load_backbone(
            ModelSpec(architecture=str(tmp_path)), Mesh(world_size=2, tp_size=2), vocab_size=99, trainable=True
        )


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_named_architecture_can_be_built(name):
    config = build_config(ModelSpec(architecture=name), 49152)
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config)
    assert model.get_input_embeddings().weight.shape[0] == 49152
    assert read_architecture(name, 7)["vocab_size"] == 7
    if name == "smollm2-135m":
        assert sum(param.numel() for param in model.parameters()) == 134_515_008
    if name == "llama-5m":
        assert 5e6 < sum(param.numel() for param in model.parameters()) < 6e6


def test_only_public_names_are_exported():
    assert kdtrain.models.load_backbone is load_backbone
    assert kdtrain.models.Backbone.__name__ == "Backbone"
    with pytest.raises(AttributeError, match="nothing"):
        _ = kdtrain.models.nothing


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_export_gives_the_same_model_in_transformers(tmp_path, name, tied):
    model = write_folder(tmp_path / "source", name, tie_word_embeddings=tied)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    backbone = load(tmp_path / "source")
    state = ((key, p[: backbone.full_shapes()[key][0]]) for key, p in backbone.hf_parameters())
    folder = export_hf(state, backbone.config, tmp_path / "out", dtype=torch.float32, tokenizer_dir=tmp_path / "source")
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert set(load_file(folder / "model.safetensors")) == set(load_file(tmp_path / "source" / "model.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 101, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert AutoConfig.from_pretrained(folder).dtype == torch.float32


def test_an_export_replaces_the_last_one_and_takes_a_config_as_data(tmp_path):
    model = write_folder(tmp_path / "source")
    settings = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    export_hf(dict(model.named_parameters()), settings, tmp_path / "out")
    assert not (tmp_path / "out" / "old").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_two_exports_of_equal_weights_are_equal_byte_for_byte(tmp_path):
    model = write_folder(tmp_path / "source")
    settings = json.loads((tmp_path / "source" / "config.json").read_text())
    first, second = (export_hf(dict(model.named_parameters()), settings, tmp_path / name) for name in ("a", "b"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    raw = (first / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert len(header["__metadata__"]) == 1  # of several keys safetensors 0.8 writes a random order


def test_failed_export_leaves_nothing_behind(tmp_path):
    model = write_folder(tmp_path / "source")
    state = dict(model.named_parameters())
    with pytest.raises(ConfigError, match=r"missing, first \['lm_head\.weight'"):
        export_hf({k: v for k, v in state.items() if k != "lm_head.weight"}, model.config, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"lm_head\.weight.*shape \(3, 3\)"):
        export_hf({**state, "lm_head.weight": torch.ones(3, 3)}, model.config, tmp_path / "out")
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        export_hf(state, model.config, tmp_path / "out", tokenizer_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_failure_while_writing_keeps_the_old_folder(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "good").write_text("good")

    def write_half():
        with replacing_folder(folder) as temporary:
            (temporary / "bad").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "good"]


KILLED = """
import os, sys
from pathlib import Path
from kdtrain.stores.folders import replacing_folder
folder, at = Path(sys.argv[1]), int(sys.argv[2])
real, calls = os.rename, []
def rename(a, b):
    if len(calls) == at:
        os._exit(9)
    calls.append(real(a, b))
os.rename = rename
with replacing_folder(folder) as temporary:
    (temporary / "new").write_text("new")
"""


@pytest.mark.parametrize("at", slow_cases([0, 1], 0))
def test_a_kill_while_a_folder_is_replaced_loses_nothing(tmp_path, at):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "good").write_text("good")
    done = subprocess.run([sys.executable, "-c", KILLED, folder, str(at)], check=False, cwd=os.getcwd())
    assert done.returncode == 9
    assert folder.exists() == (at == 0)
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".out.")]) == at + 1
    recover_folder(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "good"]
    with replacing_folder(folder) as temporary:
        (temporary / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_folder_written_by_another_process_is_not_touched(tmp_path):
    theirs = tmp_path / f".out.writing.{os.getppid()}"
    theirs.mkdir()
    (tmp_path / ".out.writing.notes").mkdir()
    recover_folder(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([theirs.name, ".out.writing.notes"])
