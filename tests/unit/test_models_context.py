"""Which models may run on parts of their sequences, and what their attention receives, by measurement."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.documents import Documents
from kdtrain.errors import ConfigError, ParallelError
from kdtrain.models.backbone import Backbone
from kdtrain.models.context import ARGUMENT, Context, use_context, whole_sequences
from kdtrain.models.context_probe import check_context
from kdtrain.models.load import ModelSpec, check_architecture, load_backbone
from kdtrain.models.tiny import TINY, tiny_config
from kdtrain.parallel.shard import shard_model

WINDOW = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
POSITIONS = torch.tensor([[*range(5), *range(7)], [*range(12)]])
STRAIGHT = torch.arange(12).expand(2, -1)


def stock(attention="sdpa", **config):
    torch.manual_seed(1)
    settings = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_config(settings, attn_implementation=attention, dtype=torch.float32).eval()


def hidden(model, **more):
    ids = torch.arange(24).view(2, 12)
    return model.base_model(input_ids=ids, position_ids=POSITIONS, use_cache=False, **more).last_hidden_state


@pytest.mark.parametrize(
    ("attention", "config"),
    [
        *((attention, TINY[name]) for name in ("llama", "qwen3", "gpt_neox") for attention in ("sdpa", "eager")),
        *((attention, tiny_config("gemma3", **WINDOW)) for attention in ("sdpa", "eager")),
        ("sdpa", {**TINY["llama"], "model_type": "mistral", "sliding_window": 3}),
        ("eager", {**TINY["llama"], "model_type": "gemma2", "head_dim": 4, "attn_logit_softcapping": 2.0, **WINDOW}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_context_attention_over_one_rank_matches_the_stock_model(attention, config):
    model = stock(attention, **config)
    want = hidden(model)
    use_context(model, Mesh(), "it")
    assert model.config._attn_implementation == f"ulysses_{attention}"
    found = hidden(model, **{ARGUMENT: Context(None, POSITIONS, Documents.of(POSITIONS))})
    assert torch.equal(found, want)
    together = hidden(model, **{ARGUMENT: Context(None, STRAIGHT, Documents.of(STRAIGHT))})
    assert (together - want)[0].abs().max() > 1e-3, "the documents of the first sequence were not apart"


@pytest.mark.parametrize("name", sorted(TINY))
def test_rotary_transformers_pass(name):
    check_context(stock(**TINY[name]), name)
    check_context(stock(**TINY[name]), name, packed=False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**TINY["llama"], "model_type": "mamba"}, "tokens depend on others outside of attention"),
        (
            {**TINY["llama"], "model_type": "bloom", "n_head": 4, "n_layer": 2},
            "tokens depend on others outside of attention",
        ),
        (
            {**TINY["llama"], "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            "tokens depend on others outside of attention",
        ),
        ({**TINY["llama"], "model_type": "opt"}, "its attention is not causal attention within documents"),
        ({**TINY["llama"], "model_type": "stablelm"}, "does not pass its keyword arguments on to attention"),
    ],
    ids=["mamba", "bloom", "lfm2", "opt", "stablelm"],
)
def test_model_that_cannot_be_sharded_by_tokens_is_refused(config, words):
    attention = "eager" if config["model_type"] in ("mamba", "bloom") else "sdpa"
    with pytest.raises(ConfigError, match=words) as refused:
        check_context(stock(attention, **config), "it")
    assert "fix: set parallel.cp=1" in str(refused.value)


def refuse_use(config, mesh, error, words):
    with pytest.raises(error, match=words) as refused:
        use_context(stock(**config), mesh, "model 'm'")
    return str(refused.value)


def test_heads_are_counted_on_every_tp_rank():
    mesh = Mesh(world_size=4, rank=0, tp_size=2, cp_size=2)
    text = refuse_use(TINY["smollm"], mesh, ParallelError, "does not divide the 3 query heads on a rank of model 'm'")
    assert "fix: set parallel.cp to one of [1, 3], or another parallel.tp" in text
    use_context(stock(**TINY["llama"]), mesh, "model 'm'")
    refuse_use(TINY["llama"], Mesh(world_size=3, cp_size=3), ParallelError, "the 8 query heads")
    use_context(stock(**TINY["smollm"]), Mesh(world_size=3, cp_size=3), "model 'm'")


def test_loading_runs_all_context_checks(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({**TINY["llama"], "model_type": "bloom", "n_head": 4, "n_layer": 2})
    )
    spec = ModelSpec(architecture=str(tmp_path), dtype="float32")
    with pytest.raises(ConfigError, match=r"parallel\.cp > 1, but tokens depend on others"):
        load_backbone(spec, Mesh(world_size=2, cp_size=2), vocab_size=101, trainable=False, packed=False)
    with pytest.raises(ConfigError, match=r"parallel\.cp > 1, but tokens depend on others"):
        check_architecture(spec, 101, Mesh(world_size=2, cp_size=2), packed=False)
    check_architecture(spec, 101, Mesh(world_size=2), packed=False)
    named = ModelSpec(architecture="smollm2-135m", dtype="float32")
    with pytest.raises(ParallelError, match="the 9 query heads on a rank of architecture 'smollm2-135m'"):
        check_architecture(named, 101, Mesh(world_size=2, cp_size=2))


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_arguments_for_other_heads_are_refused(name):
    model = stock(**TINY["llama"])
    use_context(model, Mesh(), "it")
    context = {ARGUMENT: Context(None, POSITIONS, Documents.of(POSITIONS))}
    with pytest.raises(ConfigError, match=f"LlamaAttention passes {name} to attention"):
        hidden(model, **context, **{name: torch.zeros(8)})
    with pytest.raises(ConfigError, match="LlamaAttention passes a mask of its own"):
        hidden(model, **context, attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))
    with pytest.raises(ConfigError, match="does not pass its keyword arguments on"):
        hidden(model)


def test_flash_attention_receives_boundaries_of_whole_sequences(monkeypatch):
    """The package is not installed, so the arguments passed to the stock function are checked instead."""
    calls = []

    def flash(module, query, key, value, attention_mask, **settings):
        calls.append((module, attention_mask, settings))
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    for config in (TINY["qwen3"], tiny_config("gemma3", **WINDOW)):
        model = stock(**config)
        model.config._attn_implementation = "flash_attention_2"
        use_context(model, Mesh(), "it")
        backbone = Backbone(shard_model(model, Mesh(), VocabShard.of(101)), VocabShard.of(101), {})
        batch = Batch(POSITIONS, POSITIONS, torch.ones(2, 12), POSITIONS, torch.arange(2))
        hidden(model, **backbone._attention_arguments(batch))
        windows = []
        for module, mask, settings in calls:
            assert mask is None
            assert module.config._attn_implementation == "flash_attention_2"
            assert module.is_causal
            assert settings["cu_seq_lens_q"].tolist() == settings["cu_seq_lens_k"].tolist() == [0, 5, 12, 24]
            assert settings["max_length_q"] == settings["max_length_k"] == 12
            assert torch.equal(settings["position_ids"], POSITIONS)
            windows.append(settings.get("sliding_window"))
        assert windows == ([None, None] if config["model_type"] == "qwen3" else [3, None])
        calls.clear()


def test_a_group_of_one_holds_whole_sequences():
    assert whole_sequences(POSITIONS, None) is POSITIONS
