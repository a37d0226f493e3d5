"""Mixtures of experts in one process: both forms of folders, which tensors are read, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.errors import ConfigError, ParallelError
from kdtrain.models.experts import TEACHERS, PerExpert, group_experts, num_experts_of
from kdtrain.models.flops import forward_flops_per_token
from kdtrain.models.head import load_head
from kdtrain.models.load import ModelSpec, build_config, load_backbone, model_info, parameters_on_meta
from kdtrain.models.probe import measure
from kdtrain.models.safetensors_reader import SafetensorsFolder
from kdtrain.models.shrink import COUNTS, tiny_settings
from kdtrain.models.tiny_mixtures import MIXTURES, mixture_config, write_mixture
from kdtrain.parallel.experts import expert_modules, expert_specs
from kdtrain.parallel.plan import plan_shards, read_plan

PUBLISHED_PACKED = ("gpt_oss", "granitemoe", "granitemoeshared")


def load(folder, kind="", **changes):
    # bit for bit what the stock class computes, so with masks as it does; classes with sinks have no sdpa
    attention = "eager" if kind in ("gpt_oss", "mimo_v2_flash") else "sdpa"
    spec = ModelSpec(weights=str(folder), dtype=changes.pop("dtype", "float32"), attention=attention)
    # gpt-oss gives its masks no position_ids: documents see each other, which the probe refuses
    return load_backbone(spec, Mesh(), vocab_size=99, trainable=False, packed=kind != "gpt_oss", **changes)


def stock(folder, like, dtype):
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=like.attention,
        experts_implementation=like.config._experts_implementation,
    ).eval()


def on_meta(kind, **changes):
    settings = mixture_config(kind, **changes)
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))


def test_supported_mixtures_are_those_tested_here():
    assert sorted(TEACHERS) == sorted(MIXTURES)


@pytest.mark.parametrize(
    ("kind", "packed"), [(kind, False) for kind in TEACHERS] + [(kind, True) for kind in TEACHERS[:7]]
)
def test_mixture_matches_from_pretrained(tmp_path, kind, packed):
    write_mixture(tmp_path, kind, packed=packed)
    names = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert any(".experts.3." in name for name in names) is (not packed and kind not in PUBLISHED_PACKED)
    for dtype in ("float32", "bfloat16"):
        backbone = load(tmp_path, kind, dtype=dtype)
        model = stock(tmp_path, backbone, getattr(torch, dtype))
        want = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        got = {**dict(backbone.model.named_parameters()), **dict(backbone.model.named_buffers())}
        assert set(got) == set(want)
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype, name
            assert torch.equal(got[name][: len(tensor)], tensor), name
        ids = torch.arange(18).view(2, 9)
        positions = torch.arange(9).expand(2, 9)
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            mine = backbone.hidden_states(Batch(ids, ids, torch.ones(2, 9), positions, torch.arange(2)))
        assert torch.equal(mine, hidden)


def test_any_slice_of_a_packed_parameter_is_read_from_slices_of_the_files(tmp_path):
    model = write_mixture(tmp_path, "qwen3_moe", packed=False)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    want = model.get_parameter(name)
    shape = tuple(want.shape)
    with SafetensorsFolder(tmp_path, model) as files:
        for dim, start, stop in ((0, 9, 12), (1, 3, 17), (1, 35, 47), (1, 40, 80), (2, 5, 6), (0, 0, 12), (1, 8, 8)):
            before = files.elements_read
            found = files.read(name, shape, dim, start, stop)
            assert torch.equal(found, want.narrow(dim, start, stop - start)), (dim, start, stop)
            assert files.elements_read - before == found.numel(), "more was read than requested"


def test_a_folder_that_lacks_experts_is_refused(tmp_path):
    model = write_mixture(tmp_path / "whole", "mixtral", packed=False)
    files = (tmp_path / "whole").glob("*.safetensors")
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for folder, left_out, message in (
        ("one", "layers.1.block_sparse_moe.experts.4.w3", "4 experts like .*experts.0.w3.weight', the model needs 5"),
        ("all", "experts", "no tensor for parameter 'model.layers.0.mlp.experts.gate_up_proj'"),
    ):
        (tmp_path / folder).mkdir()
        kept = {name: tensor for name, tensor in state.items() if left_out not in name}
        save_file(kept, tmp_path / folder / "model.safetensors")
        model.config.save_pretrained(tmp_path / folder)
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / folder)


def test_conversion_rule_that_does_more_than_stacking_is_refused():
    rule = WeightConverter(
        source_patterns=[".experts.*.w2.weight"],
        target_patterns=".experts.down_proj",
        operations=[MergeModulelist(dim=0), Transpose(1, 2)],
    )
    named = [("model.layers.0.mlp.experts.down_proj", ".experts.*.w2.weight", ("a", "b"))]
    with pytest.raises(ConfigError, match=r"experts.down_proj' would be made .*MergeModulelist(.|\n)*save_original"):
        group_experts(named, [rule])


def test_experts_are_ordered_by_number(tmp_path):
    model = write_mixture(tmp_path, "qwen3_moe", packed=False)
    with SafetensorsFolder(tmp_path, model) as files:
        grouped = files.grouped["model.layers.0.mlp.experts.down_proj"]
    assert isinstance(grouped, PerExpert)
    numbers = [int(key.split("experts.")[1].split(".")[0]) for _, key in grouped.places[0]]
    assert numbers == list(range(12))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_mixture_is_refused_as_student_and_allowed_as_teacher(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps(mixture_config(kind)))
    spec = ModelSpec(architecture=str(tmp_path))
    with pytest.raises(ConfigError, match=r"mixture of experts(.|\n)*router losses(.|\n)*can be its teacher"):
        build_config(spec, 99)
    assert num_experts_of(build_config(spec, 99, trainable=False))


def test_untested_mixture_is_refused_as_teacher(tmp_path):
    settings = {**mixture_config("mixtral"), "model_type": "ernie4_5_moe"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"ernie4_5_moe(.|\n)*only mixtral, qwen2_moe, .* compared with transformers"):
        build_config(ModelSpec(architecture=str(tmp_path)), 99, trainable=False)


def test_flops_count_active_experts_and_memory_counts_all(tmp_path):
    model = write_mixture(tmp_path, "qwen3_moe", packed=False)
    backbone = load(tmp_path)
    experts = sum(p.numel() for _, module in expert_modules(model) for p in module.parameters())
    assert backbone.num_parameters() == sum(p.numel() for p in model.parameters())
    assert backbone.num_parameters() - backbone.info().num_active_parameters == experts * 9 // 12  # 3 of 12 are taken
    spec = ModelSpec(weights=str(tmp_path), dtype="float32")
    info = model_info(spec, 99, trainable=False)
    assert (info.num_parameters, info.num_expert_parameters) == (backbone.num_parameters(), experts)
    full, active = (
        forward_flops_per_token(model.config, number, 16)
        for number in (backbone.num_parameters(), backbone.info().num_active_parameters)
    )
    assert full - active == 2 * experts * 9 // 12


def test_head_alone_is_read_from_a_mixture_with_the_sizes_of_its_experts(tmp_path):
    write_mixture(tmp_path, "qwen3_moe", packed=False)
    whole = load(tmp_path)
    head = load_head(ModelSpec(weights=str(tmp_path), dtype="float32"), VocabShard.of(99, 0, 2, total_rows=101))
    assert head.elements_read == 101 * 32
    found, want = head.info, whole.info()
    assert (found.num_parameters, found.num_active_parameters) == (want.num_parameters, want.num_active_parameters)


@pytest.mark.parametrize("kind", TEACHERS[:7])
def test_published_size_is_probed_on_a_copy_with_few_experts(kind):
    config = AutoConfig.for_model(kind)
    smallest = next(iter(tiny_settings(config, 4)))[1]
    counts = [value for key, value in smallest.items() if key in COUNTS]
    assert config.num_experts_per_tok < counts[0] <= 16
    assert len(counts) == 1
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config)
    found = measure(model, kind)
    assert found.future < 1e-4
    assert found.logits < 1e-4
    assert (found.leak < 1e-4) is (kind != "gpt_oss")


def test_experts_and_shared_experts_are_sharded_at_16_byte_units():
    cuts = plan_shards(on_meta("qwen3_moe"), 4, 128)
    name = "model.layers.0.mlp.experts."
    assert cuts[name + "down_proj"].shards == ((0, 16), (16, 24), (24, 32), (32, 40))
    assert cuts[name + "gate_up_proj"].ranges(1) == ((16, 24), (56, 64)), "a gate and its counterpart"
    assert "model.layers.0.mlp.gate.weight" not in cuts, "routers are replicated"
    blocks = {block.name for block in read_plan(on_meta("qwen2_moe")).blocks}
    assert "model.layers.0.mlp.shared_expert" in blocks, "transformers' plan does not name it"
    shared = {block.name for block in read_plan(on_meta("deepseek_v3")).blocks}
    assert shared == {"model.layers.0.mlp", "model.layers.1.mlp.shared_experts"}


def test_experts_that_cannot_be_sharded_are_refused_with_the_reason():
    with pytest.raises(ParallelError, match=r"down_proj_bias(.|\n)*once per rank(.|\n)*teacher.layout=plain"):
        expert_specs(on_meta("gpt_oss"), 2)
    with pytest.raises(ParallelError, match=r"48 ranks is more than the 44 intermediate features"):
        expert_specs(on_meta("mixtral"), 48)
