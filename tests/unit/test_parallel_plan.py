"""Plans and shard specs of stock models; nothing is communicated."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ParallelError
from kdtrain.models.load import parameters_on_meta
from kdtrain.models.tiny import TINY, tiny_config
from kdtrain.parallel import merge_state_dict, plan_shards, read_plan, shard_model, split_state_dict
from kdtrain.parallel.plan import vocabulary_modules
from kdtrain.parallel.shard import head_scaling


def meta_model(name="llama", **changes):
    settings = tiny_config(name, **changes) if name in TINY else {**tiny_config("llama"), "model_type": name, **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def sizes(spec):
    return [stop - start for start, stop in spec.shards]


def test_nine_heads_in_three_groups_are_divided_two_to_one():
    specs = plan_shards(meta_model("smollm"), 2, 128)
    attention = "model.layers.0.self_attn."
    assert sizes(specs[attention + "q_proj.weight"]) == [24, 12]  # 6 and 3 heads of 4
    assert sizes(specs[attention + "k_proj.weight"]) == sizes(specs[attention + "v_proj.weight"]) == [8, 4]
    assert specs[attention + "o_proj.weight"].dim == 1
    assert sizes(specs[attention + "o_proj.weight"]) == [24, 12]


def test_features_that_do_not_divide_are_uneven_and_equal_in_all_layers():
    specs = plan_shards(meta_model("qwen2"), 3, 128)
    mlp = "model.layers.1.mlp."
    assert sizes(specs[mlp + "gate_proj.weight"]) == sizes(specs[mlp + "down_proj.weight"]) == [15, 15, 14]
    attention = "model.layers.1.self_attn."
    assert sizes(specs[attention + "q_proj.bias"]) == [16, 8, 8]
    assert attention + "o_proj.bias" not in specs


def test_fused_query_key_value_is_divided_between_heads():
    specs = plan_shards(meta_model("gpt_neox"), 4, 128)
    assert sizes(specs["gpt_neox.layers.0.attention.query_key_value.weight"]) == [24] * 4
    assert sizes(specs["gpt_neox.layers.0.attention.dense.weight"]) == [8] * 4
    assert "gpt_neox.layers.0.attention.dense.bias" not in specs


def test_at_tp_1_only_the_padded_vocabulary_has_specs():
    specs = plan_shards(meta_model(), 1, 128)
    assert set(specs) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert specs["lm_head.weight"].padded == 128
    assert specs["lm_head.weight"].full_size == 101


def test_norms_inside_attention_have_partial_gradients():
    for block in read_plan(meta_model("qwen3")).blocks:
        expected = (block.name + ".q_norm", block.name + ".k_norm") if block.name.endswith("self_attn") else ()
        assert set(block.partial_grad) == set(expected)


def test_more_ranks_than_query_heads_are_refused_with_the_largest_tp():
    with pytest.raises(ParallelError, match=r"parallel\.tp = 10 is more than the 9 query heads(.|\n)*at most 9"):
        plan_shards(meta_model("smollm"), 10, 128)


def test_more_ranks_than_groups_of_a_fused_projection_are_refused_with_the_largest_tp():
    with pytest.raises(ParallelError, match=r"parallel\.tp = 5 is more than the 4 key/value groups(.|\n)*at most 4"):
        plan_shards(meta_model("phi3"), 5, 128)


def test_an_unknown_style_is_refused_with_style_and_module():
    model = meta_model()
    model._tp_plan = {**model.tp_plan, "model.layers.*.self_attn.q_proj": "sideways"}
    with pytest.raises(ParallelError, match=r"'sideways' of module 'model\.layers\.0\.self_attn\.q_proj'"):
        plan_shards(model, 2, 128)


def test_a_gathered_layer_in_a_sharded_block_is_refused():
    model = meta_model()
    model._tp_plan = {**model.tp_plan, "model.layers.*.self_attn.q_proj": "colwise_gather_output"}
    with pytest.raises(ParallelError, match=r"q_proj' is planned as (.|\n)* in the sharded block"):
        plan_shards(model, 2, 128)


def test_a_model_without_a_plan_is_refused():
    model = meta_model()
    model._tp_plan = {}
    with pytest.raises(ParallelError, match="declares no tensor-parallel plan"):
        plan_shards(model, 2, 128)


def test_a_parameter_of_a_sharded_block_without_a_style_is_refused():
    model = meta_model("qwen3")
    model._tp_plan = {key: style for key, style in model.tp_plan.items() if "k_norm" not in key}
    with pytest.raises(ParallelError, match=r"self_attn\.k_norm\.weight.*has no style for it"):
        plan_shards(model, 2, 128)


def test_a_block_without_a_row_layer_is_refused():
    model = meta_model()
    model._tp_plan = {key: style for key, style in model.tp_plan.items() if "down_proj" not in key}
    with pytest.raises(ParallelError, match="0 rowwise modules"):
        plan_shards(model, 2, 128)


def test_an_attention_whose_projection_layout_is_unknown_is_refused():
    model = meta_model("gpt_neox")
    for layer in model.gpt_neox.layers:
        layer.attention.mystery = layer.attention.query_key_value
        del layer.attention.query_key_value
    model._tp_plan = {key.replace("query_key_value", "mystery"): style for key, style in model.tp_plan.items()}
    with pytest.raises(ParallelError, match=r"column layers \['mystery'\]"):
        plan_shards(model, 2, 128)


def test_logit_scaling_is_read_and_an_unknown_kind_is_refused():
    assert head_scaling(meta_model("cohere", logit_scale=0.25).config) == (0.25, None)
    assert head_scaling(meta_model("granite", logits_scaling=8.0).config) == (0.125, None)
    assert head_scaling(meta_model("gemma3").config) == (1.0, 5.0)
    strange = meta_model().config
    strange.lm_head_multiplier = 0.5
    with pytest.raises(ParallelError, match=r"lm_head_multiplier = 0\.5"):
        head_scaling(strange)


@pytest.mark.parametrize("name", sorted(TINY))
def test_merging_a_split_state_dict_restores_it(name):
    model = meta_model(name)
    generator = torch.Generator().manual_seed(1)
    full = {key: torch.randn(param.shape, generator=generator) for key, param in model.named_parameters()}
    specs = plan_shards(model, 3, 128)
    shards = [split_state_dict(full, specs, rank) for rank in range(3)]
    merged = merge_state_dict(shards, specs)
    assert set(merged) == set(full)
    assert all(torch.equal(merged[key], full[key]) for key in full)
    rows = shards[2][f"{vocabulary_modules(model)[0]}.weight"]
    assert rows.shape[0] == 128
    assert not rows.any(), "with 101 rows the third rank has only padding"


def test_merging_ranks_with_different_names_is_refused():
    with pytest.raises(ValueError, match="rank 1 and tp rank 0 differ in names"):
        merge_state_dict([{"a": torch.ones(1)}, {"b": torch.ones(1)}], {})


def test_sharded_parameters_are_marked_and_tied_weights_remain_tied():
    model = meta_model("qwen3", tie_word_embeddings=True)
    shard_model(model, Mesh(world_size=2, rank=1, tp_size=2))
    marked = {key for key, param in model.named_parameters() if getattr(param, "tensor_model_parallel", False)}
    assert marked == {
        key for key, _ in model.named_parameters() if "proj" in key or key.startswith("model.embed_tokens")
    }
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(model.model.layers[0].self_attn.q_norm.weight, "partial_gradient", False)


def test_an_attribute_that_is_missing_in_the_model_is_refused():
    model = meta_model("phi3")
    for layer in model.model.layers:
        del layer.self_attn.num_key_value_heads
    with pytest.raises(ParallelError, match="Phi3Attention has no num_key_value_heads"):
        shard_model(model, Mesh(world_size=2, rank=0, tp_size=2))


def test_attention_that_reads_head_counts_from_its_config_gets_a_copy_of_it():
    model = meta_model("phi3")
    shard_model(model, Mesh(world_size=2, rank=0, tp_size=2))
    assert model.model.layers[0].self_attn.config.num_attention_heads == 4
    assert model.config.num_attention_heads == model.model.layers[0].mlp.config.num_attention_heads == 8


def test_more_ranks_than_intermediate_features_are_refused():
    with pytest.raises(ParallelError, match=r"parallel\.tp = 3 is more than the 2 intermediate features of .*mlp"):
        plan_shards(meta_model(intermediate_size=2), 3, 128)


def test_an_mlp_with_contradictory_sizes_is_refused():
    model = meta_model()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 43, device="meta")
    with pytest.raises(ParallelError, match=r"layers\.1\.mlp' cannot be cut: .*up_proj' has 43 output features"):
        plan_shards(model, 2, 128)


def test_attention_whose_groups_do_not_divide_its_heads_is_refused():
    model = meta_model()
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 30, device="meta")
    with pytest.raises(ParallelError, match="8 query heads do not divide"):
        plan_shards(model, 2, 128)
    model = meta_model()
    model.model.layers[0].self_attn.o_proj = torch.nn.Linear(36, 32, device="meta")
    with pytest.raises(ParallelError, match="4 key/value groups do not divide"):
        plan_shards(model, 2, 128)


def test_a_layer_of_another_class_is_refused():
    model = meta_model()
    model.model.layers[0].mlp.up_proj = torch.nn.Bilinear(32, 32, 44, device="meta")
    with pytest.raises(ParallelError, match=r"up_proj' is a Bilinear; only torch\.nn\.Linear and Conv1D"):
        plan_shards(model, 2, 128)
