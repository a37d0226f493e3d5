"""Mixtures of experts over tensor-parallel ranks: hidden states and gradients equal one process, only slices read."""

import pytest
import torch

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.models.backbone import Backbone
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny_mixtures import write_mixture
from kdtrain.parallel import merge_state_dict, shard_model
from kdtrain.parallel.experts import expert_modules
from kdtrain.parallel.plan import plan_shards

pytestmark = pytest.mark.dist

KINDS = {
    4: ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v3"),
    2: (
        "qwen2_moe",
        "cohere2_moe",
        "dots1",
        "exaone_moe",
        "granitemoe",
        "granitemoeshared",
        "hy_v3",
        "phimoe",
        "solar_open",
        "olmoe",
        "flex_olmo",
        "deepseek_v2",
        "glm4_moe_lite",
        "mimo_v2_flash",
    ),
}
"""By tp: all supported mixtures but gpt-oss. Every second one is packed on disk."""


def batch_of():
    ids = torch.arange(4 * 9).view(4, 9) * 7 % 99
    positions = torch.tensor([*range(4), *range(5)]).expand(4, 9)
    return Batch(ids, ids, torch.ones(4, 9), positions, torch.arange(4))


def routes_of(backbone, batch):
    """(hidden states, indices of experts of every token in every layer)"""
    chosen = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: chosen.append(args[1].clone()))
        for _, module in expert_modules(backbone)
    ]
    with torch.no_grad():
        hidden = backbone.hidden_states(batch)
    for hook in hooks:
        hook.remove()
    return hidden, torch.stack(chosen)


def load_cases(rank, world_size, folder, kinds):
    mesh = Mesh.build(world_size)
    answers = []
    for kind in kinds:
        spec = ModelSpec(weights=str(folder / kind), dtype="float32")
        backbone = load_backbone(spec, mesh, vocab_size=99, trainable=False)
        hidden, chosen = routes_of(backbone, batch_of())
        state = {name: param.numpy() for name, param in backbone.hf_parameters()}
        answers.append((hidden.numpy(), chosen.numpy(), state, backbone.elements_read, backbone.cuts))
    return answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtures")
    for number, kind in enumerate(sorted({kind for some in KINDS.values() for kind in some})):
        write_mixture(path / kind, kind, packed=number % 2 == 1)
    return path


@pytest.mark.parametrize("tp", KINDS)
def test_cut_experts_are_those_of_one_process(rank_pool, folder, tp):
    answers = rank_pool(tp).run(load_cases, folder=folder, kinds=KINDS[tp])
    for index, kind in enumerate(KINDS[tp]):
        one = load_backbone(
            ModelSpec(weights=str(folder / kind), dtype="float32"), Mesh(), vocab_size=99, trainable=False
        )
        want, chosen = routes_of(one, batch_of())
        assert len(chosen.unique()) > 3, "too few experts are used to see a mistake"
        for answer in answers:
            hidden, other = torch.from_numpy(answer[index][0]), torch.from_numpy(answer[index][1])
            assert torch.equal(other, chosen), f"{kind}: tokens were sent to other experts"
            error = float((hidden - want).norm() / want.norm())
            assert error < 1e-5, f"{kind}: hidden states are off by {error:.1e}"
            assert answer[index][0].tobytes() == answers[0][index][0].tobytes(), "ranks differ in a bit"
        check_reading(kind, [answer[index] for answer in answers], one, tp)


def check_reading(kind, answers, one, tp):
    cuts = answers[0][4]
    merged = merge_state_dict([{k: torch.from_numpy(v) for k, v in a[2].items()} for a in answers], cuts)
    want = {name: param[: one.full_shapes()[name][0]] for name, param in one.hf_parameters()}
    assert set(merged) == set(want)
    assert all(torch.equal(merged[name], want[name]) for name in want)
    buffers = one.elements_read - sum(p.numel() for p in want.values())  # scores' corrections, read by all
    cut = sum(param.numel() for name, param in want.items() if name in cuts)
    replicated = sum(param.numel() for name, param in want.items() if name not in cuts)
    assert sum(answer[3] for answer in answers) == cut + tp * (replicated + buffers), kind
    assert sum(1 for name in cuts if ".experts." in name) >= 2


def gradients(rank, world_size, kind):
    """Gradients of a sum over hidden states, of a trainable mixture: a missing hook would make them differ.

    Routers compute in float32 whatever the model's dtype, hence the tolerance.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from kdtrain.models.tiny_mixtures import mixture_config

    settings = mixture_config(kind)
    torch.manual_seed(5)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager").double()
    mesh = Mesh.build(world_size)
    shard = VocabShard.of(99, mesh.tp_rank, mesh.tp_size, total_rows=101)
    cuts = plan_shards(model, mesh.tp_size, shard.rows)
    backbone = Backbone(shard_model(model, mesh, shard), shard, cuts)
    hidden = backbone.hidden_states(batch_of())
    (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)).sum().backward()
    found = {name: param.grad.numpy() for name, param in backbone.hf_parameters() if param.grad is not None}
    return found, cuts


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe", "glm4_moe"])
def test_gradients_through_cut_experts_are_those_of_one_process(rank_pool, kind):
    want, _ = gradients(0, 1, kind)
    answers = rank_pool(2).run(gradients, kind=kind)
    cuts = answers[0][1]
    found = merge_state_dict([{k: torch.from_numpy(v) for k, v in a[0].items()} for a in answers], cuts)
    assert set(found) == set(want)
    assert sum("experts" in name or "mlp.gate" in name for name in want) >= 6
    for name, value in want.items():
        rows = torch.from_numpy(value)
        error = float((found[name] - rows[: len(found[name])]).norm() / rows.norm())
        assert error < 1e-6, f"{name} is off by {error:.1e}"
        for answer in answers if name not in cuts else ():
            assert torch.allclose(torch.from_numpy(answer[0][name]), rows, rtol=1e-5, atol=1e-9), name
