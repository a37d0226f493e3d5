"""kdtrain's assumptions about an architecture are measured on a tiny copy; violations are refused with the
measurement."""

import json
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.batch import Batch
from kdtrain.config.schema import RunConfig
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError, ParallelError
from kdtrain.jobs.build.models import model_specs
from kdtrain.jobs.check import print_check
from kdtrain.jobs.inputs import open_inputs
from kdtrain.jobs.sequence_prefix import prefix_choice
from kdtrain.models import probe
from kdtrain.models.architectures import ARCHITECTURES
from kdtrain.models.load import ModelSpec, build_config, check_architecture, load_backbone, parameters_on_meta
from kdtrain.models.probe import check_model, measure
from kdtrain.models.shrink import tiny_settings
from kdtrain.models.tiny import TINY, save_random, tiny_config
from tests.support.tiny_data import random_documents, write_store, write_tokenizer

COMMON = {key: value for key, value in tiny_config("llama").items() if key != "model_type"}
README = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gpt_neox": {},
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 16, "final_logit_softcapping": 4.0},
    "gemma3_text": {"sliding_window": 16, "final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0},
}
"""Every architecture that the README names (SmolLM is a Llama)."""

LEAKY = {
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 44},
    "bloom": {"n_head": 4},
    "biogpt": {},
    "qwen3_5_text": {"head_dim": 8},
    "mamba": {},
}


def folder_of(path, model_type, **settings):
    (path / "config.json").write_text(json.dumps({"model_type": model_type, **settings}))
    return ModelSpec(architecture=str(path), dtype="float32")


def on_meta(config, attention="sdpa"):
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)


def load(spec, **changes):
    return load_backbone(spec, Mesh(), **{"vocab_size": 101, "trainable": False, **changes})


@pytest.mark.parametrize("name", README)
@pytest.mark.parametrize("size", ["default", "tiny"])
def test_every_supported_architecture_passes_at_its_default_size_and_tiny(name, size):
    settings = {**COMMON, "head_dim": 8} if size == "tiny" else {}
    if name == "gpt_neox":
        settings = {}
    config = AutoConfig.for_model(name, **{**settings, **README[name]})
    model = on_meta(config, "eager" if name == "gemma2" else "sdpa")
    check_model(model, name)
    found = measure(model, name)
    assert max(found.leak, found.future, found.logits) < 1e-5
    assert found.joined > 0.01, "the copy would look right in any case"


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_named_architecture_passes(name):
    check_model(on_meta(build_config(ModelSpec(architecture=name), 49152)), name)


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_tiny_architecture_passes(name):
    settings = tiny_config(name)
    check_model(on_meta(AutoConfig.for_model(settings.pop("model_type"), **settings)), name)


@pytest.mark.parametrize("name", LEAKY)
def test_joined_documents_are_refused_only_if_positions_reset(tmp_path, name):
    spec = folder_of(tmp_path, name, **{**COMMON, **LEAKY[name]})
    match = rf"'{name}'(.|\n)*states of the second by [\d.e-]+(.|\n)*reset_positions=false"
    with pytest.raises(ConfigError, match=match):
        load(spec)
    # The result for the copy holds for the model.
    backbone = load(spec, packed=False)
    ids = torch.randint(5, 100, (1, 12), generator=torch.Generator().manual_seed(1))
    other = torch.cat([ids[:, :5] - 4, ids[:, 5:]], 1)
    positions = torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        one, two = (
            backbone.hidden_states(Batch(x, x, torch.ones(x.shape), positions, torch.arange(1))) for x in (ids, other)
        )
    assert (one[5:] - two[5:]).abs().max() > 1e-4


def test_joined_documents_are_refused_by_the_check(tmp_path):
    cfg = RunConfig()
    cfg.student.architecture = folder_of(tmp_path, "opt", **{**COMMON, **LEAKY["opt"]}).architecture
    write_store(tmp_path / "store", random_documents(4, seed=1), write_tokenizer(tmp_path / "tokenizer"))
    cfg.data.train, cfg.train.total_tokens = [str(tmp_path / "store")], 2048
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch, cfg.data.tokens_per_step = 16, 2, 64
    inputs = open_inputs(cfg, model_specs(cfg))
    with pytest.raises(ConfigError, match="'opt', which does not separate documents"):
        print_check(cfg, inputs, prefix_choice(cfg, inputs), world_size=1)
    cfg.data.reset_positions = False
    print_check(cfg, inputs, prefix_choice(cfg, inputs), world_size=1)


@pytest.mark.parametrize(
    ("kind", "changes", "settings", "message"),
    [
        ("llama", {}, {"tp": 16}, "parallel.tp = 16 is more than the 8 query heads"),
        ("llama", {"attention_dropout": 0.1}, {"tp": 2}, "ranks would draw different masks"),
        ("olmo2", {}, {"tp": 2, "sequence": True}, "every sharded layer must be in a block that gathers the tokens"),
        ("gpt2", {}, {"tp": 8}, "parallel.tp = 8 is more than the 4 key/value groups"),
    ],
)
def test_model_that_cannot_be_sharded_is_refused_by_the_check(tmp_path, kind, changes, settings, message):
    path = tmp_path / "student.json"
    path.write_text(json.dumps(tiny_config(kind, **changes)))
    spec, tp = ModelSpec(architecture=str(path), dtype="float32"), settings["tp"]
    sequence = settings.get("sequence", False)
    check_architecture(spec, 101, Mesh())
    if sequence:
        check_architecture(spec, 101, Mesh(world_size=tp, tp_size=tp))
    with pytest.raises(ParallelError, match=message):
        check_architecture(spec, 101, Mesh(world_size=tp, tp_size=tp), sequence=sequence)


def test_refusal_names_the_model_and_the_setting_of_a_teacher(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(tiny_config("llama")))
    spec, mesh = ModelSpec(architecture=str(path), dtype="float32"), Mesh(world_size=16, tp_size=16)
    for trainable in (True, False):
        with pytest.raises(ParallelError) as refused:
            check_architecture(spec, 101, mesh, trainable=trainable)
        message = f"architecture {str(path)!r}: parallel.tp = 16 is more than the 8 query heads"
        assert str(refused.value).startswith(message)
        assert str(refused.value).endswith("teacher.tp ranks, parallel.tp of them by default") == (not trainable)


@pytest.mark.parametrize(
    ("student", "teacher"), [({"tp": 2}, {}), ({}, {"layout": "tp", "tp": 2}), ({}, {"layout": "dedicated", "tp": 2})]
)
def test_check_shards_both_models_like_the_run(tmp_path, student, teacher):
    folders = {}
    for name in ("student", "teacher"):
        folders[name] = write_tokenizer(tmp_path / name, eos="<|endoftext|>")
        bloom = {**COMMON, "model_type": "bloom", "n_head": 4, "n_layer": 2, "vocab_size": 257}
        save_random(folders[name], bloom)
    write_store(tmp_path / "store", random_documents(40, seed=0), folders["teacher"])
    cfg = RunConfig()
    cfg.student.architecture, cfg.teacher.weights = str(folders["student"]), str(folders["teacher"])
    cfg.data.train, cfg.train.total_tokens, cfg.data.reset_positions = [str(tmp_path / "store")], 2048, False
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch, cfg.data.tokens_per_step = 16, 2, 64
    inputs = open_inputs(cfg, model_specs(cfg))
    print_check(cfg, inputs, prefix_choice(cfg, inputs), world_size=2)
    for section, values in ((cfg.parallel, student), (cfg.teacher, teacher)):
        for key, value in values.items():
            setattr(section, key, value)
    with pytest.raises(ParallelError, match="declares no tensor-parallel plan"):
        print_check(cfg, inputs, prefix_choice(cfg, inputs), world_size=2)


def test_non_causal_model_is_refused_with_and_without_packing(tmp_path):
    spec = folder_of(tmp_path, "bert", **COMMON)
    with pytest.raises(ConfigError, match=r"'bert', whose tokens see later tokens(.|\n)*is_decoder"):
        load(spec, packed=False)


def test_layers_between_the_decoder_and_the_head_are_refused(tmp_path):
    spec = folder_of(tmp_path, "bert", **COMMON, is_decoder=True)
    with pytest.raises(ConfigError, match=r"'bert', whose logits are not those.*\n?.*differ by"):
        load(spec, packed=False)


@pytest.mark.parametrize("source", ["architecture", "weights"])
def test_logits_scaled_another_way_are_refused_from_weights_too(tmp_path, source):
    settings = {**COMMON, "logits_scaling": 4.0}
    spec = folder_of(tmp_path, "hyperclovax", **settings)
    if source == "weights":
        AutoModelForCausalLM.from_config(AutoConfig.for_model("hyperclovax", **settings)).save_pretrained(tmp_path)
        spec = ModelSpec(weights=str(tmp_path))
    with pytest.raises(ConfigError, match="'hyperclovax', whose logits are not those"):
        load(spec)
    load(folder_of(tmp_path, "hyperclovax", **{**settings, "logits_scaling": 1.0}))


def test_probe_keeps_the_random_state_and_runs_once_per_config(monkeypatch):
    config = AutoConfig.for_model("llama", **{**COMMON, "rms_norm_eps": 1.25e-6})
    before = torch.get_rng_state()
    first = measure(on_meta(config), "llama")
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr("kdtrain.models.probe._measure_copy", None)
    assert measure(on_meta(config), "llama") is first


def test_copy_keeps_one_layer_of_each_kind_at_any_depth():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=12, layer_types=kinds * 2)
    smallest = next(iter(tiny_settings(config, 2)))[1]
    assert smallest["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
    assert smallest["num_hidden_layers"] == 3
    assert config.num_hidden_layers == 12


def test_late_kind_of_layer_without_a_list_is_probed():
    """Jamba places attention by period; its first two layers are recurrent, and a copy with only these leaks."""
    config = AutoConfig.for_model(
        "jamba", **COMMON, num_experts=1, attn_layer_period=4, attn_layer_offset=2, use_mamba_kernels=False
    )
    config.num_hidden_layers = 6
    model = on_meta(AutoConfig.for_model("jamba", **{k: v for k, v in config.to_dict().items() if k != "model_type"}))
    assert measure(model, "jamba").leak > 0.01


def test_config_without_a_runnable_copy_is_refused_with_the_attempts():
    model = on_meta(AutoConfig.for_model("llama", **COMMON))
    model.config.hidden_act = "nosuch"
    with pytest.raises(ConfigError, match=r"no tiny copy can be run\n.*with fewer heads .*hidden_size=.*'nosuch'"):
        check_model(model, "it")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4}),
        ("dbrx", {}),
        ("deepseek_v3", {"n_routed_experts": 8}),
        ("ernie4_5_moe", {"moe_num_experts": 4}),
    ],
)
def test_mixture_as_student_is_refused_with_the_missing_features(tmp_path, name, settings):
    spec = folder_of(tmp_path, name, **settings)
    with pytest.raises(ConfigError, match=r"mixture of experts(.|\n)*router losses(.|\n)*packed experts"):
        build_config(spec, 101)


def test_settings_that_contradict_each_other_end_with_a_message(tmp_path):
    with pytest.raises(ConfigError, match=r"transformers refuses(.|\n)*bos_token_id"):
        build_config(folder_of(tmp_path, "cwm", **COMMON), 101)


def test_a_dense_config_with_keys_about_experts_is_not_refused(tmp_path):
    assert build_config(folder_of(tmp_path, "doge", **COMMON), 101).num_experts > 1
    assert build_config(folder_of(tmp_path, "qwen3", **COMMON), 101).model_type == "qwen3"


def test_too_large_copy_is_refused_before_it_is_built(monkeypatch):
    """LongCat-Flash keeps all its experts at full width: the smallest copy has more than a billion parameters."""
    made = []
    monkeypatch.setattr(torch, "randn_like", lambda param, **_: made.append(param.numel()) or torch.zeros_like(param))
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"no tiny copy can be run\n.*fewer and narrower heads.* parameters, at most"):
        check_model(on_meta(AutoConfig.for_model("longcat_flash")), "it")
    assert not made
    assert time.monotonic() - start < 60


def test_only_the_smallest_copy_must_be_small(monkeypatch):
    monkeypatch.setattr(probe, "LARGEST_COPY", 60_000)
    check_model(on_meta(AutoConfig.for_model("llama")), "llama")
    monkeypatch.setattr(probe, "LARGEST_COPY", 1)
    monkeypatch.setattr(probe, "_KNOWN", {})
    with pytest.raises(ConfigError, match=r"(?s)parameters, at most 1\n.*fewer layers only.*at most 30,000,000\n"):
        check_model(on_meta(AutoConfig.for_model("llama")), "llama")


def test_per_layer_settings_follow_the_layers_of_a_copy():
    """Gemma 4's full-attention layers have wider heads, by a table whose keys were past the copy's last layer."""
    config = AutoConfig.for_model("gemma4_text")
    smallest = next(iter(tiny_settings(config, 2)))[1]
    kinds = smallest["layer_types"]
    assert list(smallest["per_layer_config"]) == [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    found = measure(on_meta(config), "gemma4_text")
    assert max(found.leak, found.future, found.logits) < 1e-5
    assert found.joined > 0.01
