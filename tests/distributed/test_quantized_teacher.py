"""A quantised teacher in every layout against plain torch with the same rounded weights as whole matrices."""

import importlib.util
import json
from functools import partial

import pytest
import torch

from kdtrain.distributed.mesh import Mesh
from kdtrain.jobs.build.models import Models
from kdtrain.jobs.quantized import quantize_teacher
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.quantize import quantize_decoder_
from kdtrain.models.tiny import tiny_config
from kdtrain.parallel.shard_tensors import split_tensor
from kdtrain.teacher.online import OnlineTeacher
from kdtrain.teacher.signal import HeadLayout
from tests.support.layout_oracle import check_case, oracle
from tests.support.layout_steps import (
    Case,
    build_backbone,
    build_teacher,
    join,
    micro_batches,
    run_cases,
    step_batch,
    teacher_settings,
    whole_teacher,
)

pytestmark = [
    pytest.mark.dist,
    pytest.mark.deepspeed,
    pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed"),
]

# (world size, format) -> (tp, ZeRO stage, teacher's layout)
CASES = {
    (2, "int8"): [(2, 1, "plain"), (2, 2, "tp"), (1, 1, "tp2 overlap"), (1, 3, "plain")],
    (2, "fp8"): [(2, 3, "tp"), (1, 2, "plain")],
    (4, "int8"): [(2, 1, "tp4")],
}


def quantized_teacher(folder, student, mesh, words, kind):
    teacher = build_teacher(folder, student, mesh, words)
    quantize_decoder_(teacher.backbone, kind)
    return teacher


def rounded_teacher(folder, kind):
    """For the oracle: the rounded weights in their original dtype."""
    teacher = whole_teacher(folder)
    for name, weight in whole_weights(teacher, kind).items():
        dict(teacher.hf_parameters())[name].data = weight
    return teacher


def whole_weights(backbone, kind):
    """Every matrix of the decoder after torchao has rounded it as a whole."""
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow

    rounded = {"int8": Int8Tensor, "fp8": Float8Tensor}[kind].from_hp
    return {
        name: rounded(param.detach(), granularity=PerRow()).dequantize()
        for name, param in backbone.hf_parameters()
        if param.dim() == 2 and "embed" not in name and "lm_head" not in name
    }


def cases(world_size, kind):
    return [Case("llama", tp, stage, (4, 1, 3), teacher=words) for tp, stage, words in CASES[world_size, kind]]


def run(rank, world_size, folder, kind):
    return run_cases(rank, world_size, folder, cases(world_size, kind), partial(quantized_teacher, kind=kind))


@pytest.mark.parametrize(("world_size", "kind"), CASES)
def test_a_quantised_teacher_equals_plain_torch_with_the_rounded_weights(world_size, kind, fresh_pool, tmp_path):
    answers = fresh_pool(world_size).run(run, folder=tmp_path, kind=kind)
    want = oracle(tmp_path, "llama", True, partial(rounded_teacher, kind=kind))
    for rank in range(world_size):
        assert answers[rank] == answers[0], "ranks disagree about a loss or a norm"
    for case, answer in zip(cases(world_size, kind), answers[0], strict=True):
        check_case(case, answer, want, tmp_path / case.name)


def measured(rank, world_size, folder, kind):
    """The cost on this rank per layout, after a comparison of its shards with those of whole matrices."""
    meshes = join(world_size)
    whole = whole_weights(whole_teacher(folder), kind)
    found = []
    for tp, words in ((2, "plain"), (2, "tp"), (1, "tp2"), (1, "plain")):
        mesh = meshes[tp]
        student = build_backbone(folder, "llama", mesh, teacher=words)
        teacher = build_teacher(folder, student, mesh, words)
        cfg = teacher_settings(mesh, words)
        cfg.teacher.quantize = kind
        layout = HeadLayout(student.shard, mesh.tp_group, 16 * student.shard.rows * 3)
        batch = micro_batches(step_batch(1), mesh, 8)[0]
        found.append(quantize_teacher(cfg, Models(student, teacher, layout, teacher.backbone), batch, mesh))
        params, specs = dict(teacher.backbone.hf_parameters()), teacher.backbone.cuts
        for name, weight in whole.items():
            spec = specs.get(name)
            tp_rank = 0 if spec is None else rank % spec.tp_size
            assert torch.equal(params[name].dequantize(), split_tensor(weight, spec, tp_rank)), (words, name)
    return found


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_cost_of_quantisation_is_equal_in_every_layout_and_on_all_ranks(kind, fresh_pool, tmp_path):
    answers = fresh_pool(2).run(measured, folder=tmp_path, kind=kind)
    assert answers[0] == answers[1]
    backbone = whole_teacher(tmp_path)
    teacher = OnlineTeacher(backbone, Mesh(), backbone.shard, Mesh())
    cfg = teacher_settings(Mesh(), "plain")
    cfg.teacher.quantize = kind
    models = Models(backbone, teacher, HeadLayout(backbone.shard, None, 1 << 20), backbone)
    want = quantize_teacher(cfg, models, step_batch(1), Mesh())
    assert want.kl > 1e-7
    for cost in answers[0]:
        assert cost.kl == pytest.approx(want.kl, rel=1e-3)
        assert cost.num_tokens == want.num_tokens == 39
        assert cost.bytes_share == pytest.approx(want.bytes_share, abs=0.15), "padding of a vocabulary differs"


LATENT = {
    "model_type": "minicpm3",
    "num_key_value_heads": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}


def latent_weights(rank, world_size, folder, kind):
    """Latent attention over tp: names of the quantised weights, after a comparison of each shard with the whole."""
    spec = ModelSpec(architecture=str(folder / "latent.json"), dtype="float32", attention="sdpa")
    whole, sharded = (load_backbone(spec, mesh, vocab_size=101, trainable=False) for mesh in (Mesh(), Mesh.build(2)))
    want = whole_weights(whole, kind)
    quantize_decoder_(sharded, kind)
    found = {name: param for name, param in sharded.hf_parameters() if hasattr(param, "qdata")}
    for name, param in found.items():
        spec = sharded.cuts.get(name)
        right = want[name] if spec is None else split_tensor(want[name], spec, rank)
        assert torch.equal(param.dequantize(), right), name
    return sorted(want), sorted(found)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_latent_projections_are_equal_sharded_and_whole(kind, rank_pool, tmp_path):
    (tmp_path / "latent.json").write_text(json.dumps({**tiny_config("llama"), **LATENT}))
    for whole, sharded in rank_pool(2).run(latent_weights, folder=tmp_path, kind=kind):
        assert sharded == whole
