"""A head read by itself is the head of the whole model, row for row, and nothing else is read."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.errors import ConfigError
from kdtrain.models.head import load_head
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny import tiny_config

VOCAB = 300  # tokens of the tokenizer; the models have a few rows more
MODELS = {
    "untied": tiny_config("llama"),
    "tied": tiny_config("qwen3", tie_word_embeddings=True),
    "soft-capped": tiny_config("gemma3"),
    "neox": tiny_config("gpt_neox"),
    "scaled and biased": {**tiny_config("llama"), "model_type": "phi", "num_key_value_heads": 8},
}


def save(folder, settings, dtype=torch.float32):
    settings = {**settings, "vocab_size": 307}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(param)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_shard_of_a_head_matches_the_whole_model(name, dtype, tmp_path):
    model = save(tmp_path, MODELS[name])
    spec = ModelSpec(weights=str(tmp_path), dtype=dtype, attention="sdpa")
    whole = load_backbone(spec, Mesh(), vocab_size=VOCAB, total_rows=512, trainable=False)
    head = whole.lm_head_shard
    for tp_rank in range(4):
        shard = VocabShard.of(VOCAB, tp_rank, 4, total_rows=512)
        loaded = load_head(spec, shard)
        rows = slice(shard.start, shard.stop)
        assert torch.equal(loaded.head.weight, head.weight[rows])
        assert (loaded.head.bias is None) == (head.bias is None)
        assert head.bias is None or torch.equal(loaded.head.bias, head.bias[rows])
        assert (loaded.head.logit_scale, loaded.head.softcap) == (head.logit_scale, head.softcap)
        assert not loaded.head.weight.requires_grad
        real = max(0, min(shard.stop, 307) - shard.start)
        assert loaded.elements_read == real * (head.weight.shape[1] + (head.bias is not None))
        assert loaded.info.num_parameters == whole.num_parameters() == sum(p.numel() for p in model.parameters())
    assert any(real for real in head.weight.abs().sum(1)), "a head of zeros would compare nothing"


def test_a_model_without_weights_has_no_head_to_read():
    with pytest.raises(ConfigError, match="only a model with weights"):
        load_head(ModelSpec(architecture="llama-5m"), VocabShard.of(VOCAB))
