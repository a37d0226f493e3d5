"""A multimodal model is refused by its kind, and its text part, saved alone, is loaded."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError
from kdtrain.models.composite import refuse_composite
from kdtrain.models.load import ModelSpec, build_config, load_backbone, model_rows
from kdtrain.models.tiny import tiny_config

DOCS = Path(__file__).resolve().parents[2] / "docs/export.md"
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def refused(folder, work):
    with pytest.raises(ConfigError) as caught:
        work(ModelSpec(weights=str(folder)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "part", "text_type"),
    [
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "text_config", "gemma3_text"),
        ({"model_type": "gemma3"}, "text_config", "gemma3_text"),  # all settings are the class's defaults
        ({"model_type": "gemma3n", "text_config": {}}, "text_config", "gemma3n_text"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, "text_config", "mistral"),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, "text_config", "llama4_text"),
        ({"model_type": "qwen2_vl", "vocab_size": 151936, "vision_config": {}}, "text_config", None),
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "internlm2"}}, "llm_config", None),
        ({"model_type": "qwen2_5_omni", "thinker_config": {}}, "thinker_config", None),
    ],
)
def test_text_and_image_model_is_refused_by_its_kind(tmp_path, settings, part, text_type):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for work in (lambda spec: model_rows(spec, 9), lambda spec: build_config(spec, 9)):
        message = refused(tmp_path, work)
        assert f"has model_type {settings['model_type']!r}: its language model is the part {part!r}" in message
        assert "text-and-image models are not supported" in message
        assert "vocab_size = None" not in message
        assert (f"save its text part, of model_type {text_type!r}" in message) == (text_type is not None)
        assert "use a model of text alone" in message


def test_no_causal_text_model_is_refused_as_a_part():
    """Every class that transformers lists for causal language models, but those with a text part of their own."""
    refused_types = set()
    for config in AutoModelForCausalLM._model_mapping:
        try:
            refuse_composite({"model_type": config.model_type}, "x")
        except ConfigError:
            refused_types.add(config.model_type)
    known = {"gemma3", "gemma3n", "gemma4", "llama4", "mllama", "qwen3_5", "fuyu", "emu3", "got_ocr2"}
    assert known <= refused_types
    assert all("text_config" in CONFIG_MAPPING[kind].sub_configs for kind in refused_types)
    refuse_composite({"model_type": "nosuch"}, "x")


@pytest.mark.parametrize(("kind", "vision"), [("gemma3", "siglip_vision_model"), ("mistral3", "pixtral")])
def test_documented_recipe_saves_a_text_part_that_loads_exactly(tmp_path, kind, vision):
    # with a soft-cap the larger Gemma 3 class, which does not apply it, would compute other logits
    text = {
        "gemma3": tiny_config("gemma3", final_logit_softcapping=None),
        "mistral3": {**tiny_config("llama"), "model_type": "mistral"},
    }[kind]
    config = AutoConfig.for_model(kind, text_config=text, vision_config={"model_type": vision, **VISION})
    torch.manual_seed(3)
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    whole.save_pretrained(tmp_path / "whole")
    recipe = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL).group(1)
    exec(recipe.replace("bfloat16", "float32"), {"SOURCE": tmp_path / "whole", "TARGET": tmp_path / "text"})
    spec = ModelSpec(weights=str(tmp_path / "text"), dtype="float32")
    assert model_rows(spec, 99) == 101
    ids = torch.randint(0, 99, (1, 9))
    backbone = load_backbone(spec, Mesh(), vocab_size=99, trainable=False)
    batch = Batch(ids, ids, torch.ones(ids.shape), torch.arange(9)[None], torch.arange(1))
    with torch.no_grad():
        wanted = whole(input_ids=ids).logits[0]
        head = backbone.lm_head_shard
        found = backbone.hidden_states(batch) @ head.weight.T
    torch.testing.assert_close(found[:, :101], wanted, rtol=1e-5, atol=1e-5)
