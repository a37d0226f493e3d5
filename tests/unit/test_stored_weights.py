"""Tensors of a folder: quantised, unused, without a head, or under a base model's names.

Every folder is both checked (as --check does) and loaded, and must fare alike; what is loaded must be the model that
transformers makes of the folder.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.errors import ConfigError
from kdtrain.models.head import load_head
from kdtrain.models.load import ModelSpec
from kdtrain.models.tiny import save_random, tiny_config
from kdtrain.models.tiny_mixtures import write_mixture
from kdtrain.parallel.shard_tensors import merge_state_dict
from tests.support.model_folders import check_and_load, edit_json, edit_tensors

LLAMA = tiny_config("llama")
OPT = {
    "model_type": "opt",
    "vocab_size": 101,
    "hidden_size": 32,
    "ffn_dim": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "word_embed_proj_dim": 32,
}
Q, MODEL = "model.layers.0.self_attn.q_proj.", "model.safetensors"


def equals_stock(folder, **how):
    """The logits of the loaded model, which must be exactly those of `from_pretrained`."""
    backbone = check_and_load(folder, **{"attention": "sdpa", **how})
    ids = torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, ids, torch.ones(2, 9), torch.arange(9).expand(2, 9), torch.arange(2))
    attention = backbone.config._attn_implementation
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        mine = backbone(batch, lambda hidden, head: hidden @ head.weight.T)[:, :101]
        assert torch.equal(mine, stock(ids).logits.flatten(0, 1))
    return backbone


def refuse(folder, match, **how):
    with pytest.raises(ConfigError, match=match) as caught:
        check_and_load(folder, **how)
    assert "\n  fix: " in str(caught.value)


def to_float8(tensors):
    tensors[Q + "weight_scale"] = tensors[Q + "weight"].abs().max() / 448
    tensors[Q + "weight"] = (tensors[Q + "weight"] / tensors[Q + "weight_scale"]).to(torch.float8_e4m3fn)


def to_int8(tensors):
    weight = tensors[Q + "weight"]
    scale = weight.abs().amax(1, keepdim=True) / 127
    tensors.update({Q + "weight": (weight / scale).round().to(torch.int8), Q + "weight_scale": scale})


def to_gptq(tensors):
    rows, columns = tensors.pop(Q + "weight").shape
    tensors[Q + "qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
    tensors[Q + "qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
    tensors[Q + "scales"] = torch.ones(1, rows, dtype=torch.float16)
    tensors[Q + "g_idx"] = torch.zeros(columns, dtype=torch.int32)


def to_packed(tensors):
    rows, columns = tensors.pop(Q + "weight").shape
    tensors[Q + "weight_packed"] = torch.zeros(rows, columns // 8, dtype=torch.int32)
    tensors[Q + "weight_scale"] = torch.ones(rows, 1, dtype=torch.bfloat16)
    tensors[Q + "weight_shape"] = torch.tensor([rows, columns])


def to_bitsandbytes(tensors):
    weight = tensors[Q + "weight"]
    tensors[Q + "weight"] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    tensors[Q + "weight.absmax"] = torch.ones(weight.numel() // 64)
    tensors[Q + "weight.quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (to_float8, rf"'{Q}weight' of {MODEL} is stored as F8_E4M3"),
        (to_int8, rf"'{Q}weight' of {MODEL} is stored as I8"),
        (to_gptq, rf"'{Q}g_idx' of {MODEL} \(I32\) has no place in the model, and 3 more"),
        (to_packed, rf"'{Q}weight_packed' of {MODEL} \(I32\) has no place in the model, and 2 more"),
        (to_bitsandbytes, rf"'{Q}weight' of {MODEL} is stored as U8"),
        (
            lambda t: t.update({Q + "weight": t[Q + "weight"].to(torch.int32)}),
            rf"'{Q}weight' of {MODEL} is stored as I32",
        ),
        (lambda t: t.update({Q + "k_scale": torch.ones(1)}), rf"'{Q}k_scale' of {MODEL} \(F32\) has no place"),
    ],
)
@pytest.mark.parametrize("trainable", [False, True])
def test_quantised_weights_are_refused_without_a_mark_in_config_json(tmp_path, change, says, trainable):
    save_random(tmp_path, LLAMA)
    edit_tensors(tmp_path, change)
    refuse(tmp_path, f"is quantised: tensor {says}", trainable=trainable)


@pytest.mark.parametrize("mark", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_quantisation_file_beside_the_weights_is_refused_unless_allowed(tmp_path, mark):
    save_random(tmp_path, LLAMA)
    (tmp_path / mark).write_text("{}")
    refuse(tmp_path, rf"is quantised: it has {mark}, of (NVIDIA ModelOpt|GPTQ|AWQ)(.|\n)*allow_unused_weights=true")
    equals_stock(tmp_path, allow_unused_weights=True)
    edit_tensors(tmp_path, to_float8)
    for allowed in (False, True):
        refuse(tmp_path, rf"F8_E4M3 \(and there is {mark}, of", allow_unused_weights=allowed)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantisation_in_config_json_is_refused(tmp_path, key):
    save_random(tmp_path, LLAMA)
    edit_json(tmp_path / "config.json", **{key: {"quant_method": "compressed-tensors"}})
    refuse(tmp_path, f"is quantised: its config.json has {key}")


def test_quantised_experts_buffers_and_heads_are_refused(tmp_path):
    model = write_mixture(tmp_path, "deepseek_v3", packed=False)
    model.save_pretrained(tmp_path, save_original_format=True)  # now in one file
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    for name in (expert, bias):
        edit_tensors(tmp_path, lambda t, name=name: t.update({name: t[name].to(torch.float8_e5m2)}))
        refuse(tmp_path, rf"tensor '{name}' of {MODEL} is stored as F8_E5M2")
        edit_tensors(tmp_path, lambda t, name=name: t.update({name: t[name].float()}))
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}))
    with pytest.raises(ConfigError, match=r"'lm_head\.weight' of .* is stored as I8"):
        load_head(ModelSpec(weights=str(tmp_path), dtype="float32"), VocabShard.of(99, 0, 2, total_rows=101))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_ordinary_dtypes_are_read_exactly(tmp_path, dtype):
    save_random(tmp_path, LLAMA)
    edit_tensors(tmp_path, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    equals_stock(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["model.layers.2.input_layernorm.weight", Q + "bias", "score.weight", "vision_tower.blocks.0.attn.qkv.weight"],
)
def test_tensors_without_a_place_are_refused_unless_allowed(tmp_path, name):
    save_random(tmp_path, LLAMA)
    edit_tensors(tmp_path, lambda t: t.update({name: torch.ones(32)}))
    match = rf"tensor '{name}' of {MODEL} has no place in the model\n(.|\n)*allow_unused_weights=true"
    refuse(tmp_path, match)
    equals_stock(tmp_path, allow_unused_weights=True)


def test_tensors_of_older_releases_are_ignored(tmp_path):
    save_random(tmp_path / "gpt2", tiny_config("gpt2", tie_word_embeddings=True), base=True)
    mask = torch.ones(1, 1, 128, 128).tril()
    edit_tensors(
        tmp_path / "gpt2", lambda t: t.update({"h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(0.0)})
    )
    equals_stock(tmp_path / "gpt2")
    save_random(tmp_path / "llama", LLAMA)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.layers.0.self_attn.bias": mask.bool()}
    edit_tensors(tmp_path / "llama", lambda t: t.update(old))
    equals_stock(tmp_path / "llama")
    edit_tensors(tmp_path / "llama", lambda t: t.update({"model.layers.0.self_attn.bias": torch.arange(32)}))
    refuse(tmp_path / "llama", r"'model\.layers\.0\.self_attn\.bias' of .* has no place")


def test_tensors_that_the_class_ignores_are_ignored(tmp_path):
    write_mixture(tmp_path / "sharded", "deepseek_v3", packed=False).save_pretrained(tmp_path / "one")
    mtp = "model.layers.61."
    edit_tensors(
        tmp_path / "one", lambda t: t.update({f"{mtp}mlp.experts.{i}.up_proj.weight": torch.ones(3) for i in (0, 1)})
    )
    check_and_load(tmp_path / "one")
    edit_tensors(tmp_path / "one", lambda t: t.update({"model.layers.60.mlp.up_proj.weight": torch.ones(3)}))
    refuse(tmp_path / "one", r"'model\.layers\.60\.mlp\.up_proj\.weight' of .* has no place")


@pytest.mark.parametrize(
    ("settings", "packed", "name"),
    [
        (tiny_config("gpt2", tie_word_embeddings=True), True, "h.0.ln_1.weight"),
        (OPT, False, "decoder.layers.0.fc1.weight"),
        (tiny_config("llama", tie_word_embeddings=True), True, "layers.0.mlp.up_proj.weight"),
        (tiny_config("gpt_neox", tie_word_embeddings=True), True, "layers.0.mlp.dense_h_to_4h.weight"),
        (tiny_config("gemma3", tie_word_embeddings=True), True, "layers.0.mlp.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_a_base_model_with_a_tied_head_is_loaded_under_its_own_names(tmp_path, settings, packed, name, shard_size):
    save_random(tmp_path, settings, base=True, shard_size=shard_size)
    if shard_size == "1GB":
        edit_tensors(tmp_path, lambda tensors: tensors[name])  # published without the prefix
    if settings["model_type"] == "gemma3_text":  # its soft-cap belongs to the head
        check_and_load(tmp_path, packed=packed)
    else:
        equals_stock(tmp_path, packed=packed)


def test_every_rank_reads_only_its_slices_of_a_base_model(tmp_path):
    save_random(tmp_path, tiny_config("gpt2", tie_word_embeddings=True), base=True)
    whole = check_and_load(tmp_path)
    ranks = [check_and_load(tmp_path, mesh=Mesh(world_size=2, rank=rank, tp_size=2)) for rank in (0, 1)]
    merged = merge_state_dict([dict(rank.hf_parameters()) for rank in ranks], ranks[0].cuts)
    for name, param in whole.hf_parameters():
        assert torch.equal(merged[name], param[: len(merged[name])]), name
    for number, rank in enumerate(ranks):
        shares = {name: cut.held_size(number) / cut.full_size for name, cut in rank.cuts.items()}
        held = sum(shares.get(name, 1) * torch.Size(shape).numel() for name, shape in whole.full_shapes().items())
        assert rank.elements_read == held < whole.elements_read


def test_a_base_model_without_its_head_is_refused_for_that_reason(tmp_path):
    save_random(tmp_path, LLAMA, base=True)
    refuse(tmp_path, r"no tensor for the head 'lm_head\.weight', which config\.json does not tie(.|\n)*AutoModel\)")
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    equals_stock(tmp_path)


def test_experts_of_a_base_model_are_stacked(tmp_path):
    model = write_mixture(tmp_path / "whole", "qwen3_moe", packed=False, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path / "base", save_original_format=True)
    edit_tensors(tmp_path / "base", lambda tensors: tensors["layers.0.mlp.experts.3.up_proj.weight"])
    want, got = check_and_load(tmp_path / "whole"), check_and_load(tmp_path / "base")
    for (name, mine), (_, theirs) in zip(got.hf_parameters(), want.hf_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_files_may_keep_either_name_of_a_tied_pair(tmp_path):
    save_random(tmp_path, tiny_config("llama", tie_word_embeddings=True))
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    equals_stock(tmp_path)


def test_missing_tensor_is_refused_with_the_unused_ones(tmp_path):
    save_random(tmp_path, LLAMA)
    edit_tensors(tmp_path, lambda t: t.update({"model.norm.gain": t.pop("model.norm.weight")}))
    refuse(
        tmp_path,
        r"no tensor for parameter 'model\.norm\.weight' of LlamaForCausalLM \(1 are missing; "
        r"without a place in it: \['model\.norm\.gain'\]\)",
    )
