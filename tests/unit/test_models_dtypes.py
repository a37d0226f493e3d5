"""Every tensor has the dtype that transformers gives it: loaded, exported, counted, and not quantised."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.batch import Batch
from kdtrain.config.schema import RunConfig
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError
from kdtrain.jobs.build.models import model_specs
from kdtrain.jobs.check import print_check
from kdtrain.jobs.header import memory_inputs
from kdtrain.jobs.inputs import open_inputs
from kdtrain.jobs.sequence_prefix import prefix_choice
from kdtrain.models.dtypes import listed_in_float32, stock_dtypes
from kdtrain.models.export import export_hf
from kdtrain.models.load import ModelSpec, load_backbone, model_info, parameters_on_meta
from kdtrain.models.quantize import quantizable_layers
from kdtrain.models.tiny import tiny_config
from kdtrain.models.tiny_mixtures import write_mixture
from kdtrain.planning.estimate import ModelSize, estimate_memory
from tests.support.tiny_data import random_documents, write_store, write_tokenizer

HYBRID = tiny_config(
    "olmo2",
    model_type="olmo_hybrid",
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=4,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
SMALL = {"vocab_size": 101, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT = {**SMALL, "model_type": "openai-gpt", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
XGLM = {
    **SMALL,
    "model_type": "xglm",
    "d_model": 48,
    "ffn_dim": 44,
    "num_layers": 2,
    "attention_heads": 4,
    "pad_token_id": 1,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
MAMBA = {**SMALL, "model_type": "falcon_mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
APERTUS = tiny_config("llama", model_type="apertus")  # keeps numbers, tensors without a dimension, in its files
DENSE = {
    config["model_type"]: config for config in (tiny_config("qwen3"), tiny_config("gemma3"), GPT, XGLM, MAMBA, APERTUS)
}


def write(folder, config, **changes):
    """A folder with a random model in float32, nothing in it rounded to bfloat16 yet."""
    settings = {**config, **changes}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    model.save_pretrained(folder)


def tensors(model):
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if not name.endswith("embed_scale")}  # ours has a number


def on_meta(config):
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)


@pytest.mark.parametrize("kind", DENSE)
def test_parameters_buffers_and_hidden_states_match_from_pretrained(tmp_path, kind):
    write(tmp_path, DENSE[kind])
    spec = ModelSpec(weights=str(tmp_path), dtype="bfloat16")
    backbone = load_backbone(spec, Mesh(), vocab_size=101, trainable=False, packed=False)
    attention = backbone.config._attn_implementation
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation=attention).eval()
    got, want = tensors(backbone.model), tensors(model)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name][: len(tensor)] if tensor.dim() else got[name], tensor), name
    ids = torch.arange(5, 23).view(2, 9)
    positions = torch.arange(9).expand(2, 9)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        mine = backbone.hidden_states(Batch(ids, ids, torch.ones(2, 9), positions, torch.arange(2)))
    assert torch.equal(mine, hidden)


def test_tensors_created_in_float32_stay_in_float32_listed_or_not(tmp_path):
    write(tmp_path, HYBRID)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    want = {name: tensor.dtype for name, tensor in tensors(model).items()}
    assert [name for name, param in model.named_parameters() if param.dtype == torch.float32] == [
        "model.layers.0.linear_attn.A_log"
    ]
    assert stock_dtypes(on_meta(HYBRID), torch.bfloat16).items() >= want.items()
    (tmp_path / "architecture.json").write_text(json.dumps(HYBRID))
    spec = ModelSpec(architecture=str(tmp_path / "architecture.json"), dtype="bfloat16")
    backbone = load_backbone(spec, Mesh(), vocab_size=101, trainable=True, packed=False)
    assert {name: tensor.dtype for name, tensor in tensors(backbone.model).items()} == want


def test_an_export_in_bfloat16_keeps_float32_where_transformers_does(tmp_path):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**HYBRID), dtype=torch.float32)
    state = {name: torch.randn_like(param) for name, param in model.named_parameters()}
    export_hf(state, HYBRID, tmp_path / "out", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    floats = [name for name, tensor in stored.items() if tensor.dtype == torch.float32]
    assert len(floats) == 1
    assert floats[0].endswith("A_log")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, param in again.named_parameters():
        assert torch.equal(param, state[name].to(param.dtype)), name
    assert torch.equal(
        again.get_parameter("model.layers.0.linear_attn.A_log"), state["model.layers.0.linear_attn.A_log"]
    )


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe", "mixtral"])
def test_float32_tensors_are_counted_with_four_bytes(tmp_path, kind):
    write_mixture(tmp_path, kind, packed=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {name: param.numel() for name, param in stock.named_parameters() if param.dtype == torch.float32}
    info = model_info(ModelSpec(weights=str(tmp_path), dtype="bfloat16"), 99, trainable=False)
    assert (set(info.float32), info.num_float32_parameters) == (set(wide), sum(wide.values()))
    assert model_info(ModelSpec(weights=str(tmp_path), dtype="float32"), 99, trainable=False).float32 == ()
    size = ModelSize(info.num_parameters, 32, 2, 99, 0, info.num_float32_parameters)
    assert size.weight_bytes("bfloat16") == sum(param.nbytes for param in stock.parameters())
    assert size.weight_bytes("float32") == 4 * info.num_parameters
    inputs = memory_inputs(RunConfig())
    student = ModelSize(1000, 32, 2, 99)
    found = estimate_memory(inputs, student, size, dp_size=1, on_cuda=True, student_attention="sdpa")
    assert found.parts["teacher"] == size.weight_bytes("bfloat16")


def test_layer_kept_in_float32_is_not_quantised():
    model = on_meta(tiny_config("qwen3"))
    whole = quantizable_layers(model, "int8")
    assert listed_in_float32(model) is None
    model._keep_in_fp32_modules_strict = {"1.self_attn.o_proj", "up_*"}  # as its class would list them
    left = quantizable_layers(model, "int8")
    out = {name for name, module in model.named_modules() if module in whole and module not in left}
    assert out == {"model.layers.1.self_attn.o_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}


def test_check_refuses_stage_3_for_a_bfloat16_student_with_float32_tensors(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**HYBRID, "vocab_size": 300}))
    write_store(tmp_path / "store", random_documents(40, seed=1), write_tokenizer(tmp_path / "tokenizer"))
    cfg = RunConfig()
    cfg.student.architecture, cfg.student.dtype, cfg.zero.stage = str(tmp_path / "config.json"), "bfloat16", 3
    cfg.data.train, cfg.train.total_tokens, cfg.data.reset_positions = [str(tmp_path / "store")], 2048, False
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch, cfg.data.tokens_per_step = 16, 2, 64
    cfg.run.output_dir, cfg.run.name = str(tmp_path / "runs"), "x"
    inputs = open_inputs(cfg, model_specs(cfg))
    with pytest.raises(ConfigError, match=r"zero.stage = 3 (.|\n)*A_log'(.|\n)*set zero.stage=2"):
        print_check(cfg, inputs, prefix_choice(cfg, inputs), world_size=1)
    for stage, dtype in ((2, "bfloat16"), (3, "float32")):
        cfg.zero.stage, cfg.student.dtype = stage, dtype
        print_check(cfg, inputs, prefix_choice(cfg, inputs), world_size=1)
