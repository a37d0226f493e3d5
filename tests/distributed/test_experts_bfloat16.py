"""Mixtures in bfloat16 whose routers transformers keeps in float32: the same routes as there in all layouts."""

import itertools
from functools import partial

import pytest
import torch

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny_mixtures import write_mixture
from kdtrain.parallel.experts import expert_modules

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

KINDS = ("glm4_moe", "deepseek_v3", "solar_open")
LAYOUTS = ((1, False, False), (2, False, False), (1, True, False), (1, True, True), (2, True, False))
"""(tp, ZeRO-3, partitions in host memory), on two ranks."""


def batch_of():
    ids = torch.arange(4 * 9).view(4, 9) * 7 % 99
    positions = torch.tensor([*range(4), *range(5)]).expand(4, 9)
    return Batch(ids, ids, torch.ones(4, 9), positions, torch.arange(4))


def watched(experts, run):
    """(hidden states in float32, the experts of every token in every layer)"""
    chosen = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: chosen.append(args[1].clone())) for module in experts
    ]
    with torch.no_grad():
        hidden = run().float()
    for hook in hooks:
        hook.remove()
    return hidden, torch.stack(chosen)


def spec_of(folder, kind):
    """With masks, as in the stock class, for a bitwise comparison."""
    return ModelSpec(weights=str(folder / kind), dtype="bfloat16", attention="sdpa")


def run_layouts(rank, world_size, folder):
    from kdtrain.engine import bootstrap
    from kdtrain.engine.frozen import FrozenEngine

    bootstrap.start()
    answers = {}
    for kind in KINDS:
        for tp, divided, offload in LAYOUTS:
            mesh = Mesh.build(tp)
            spec = spec_of(folder, kind)
            backbone = load_backbone(spec, mesh, vocab_size=99, trainable=False)
            experts, owner = [module for _, module in expert_modules(backbone)], backbone
            if divided:
                owner = FrozenEngine(backbone, mesh, device=torch.device("cpu"), dtype="bfloat16", offload=offload)
                owner.hidden_states(batch_of())  # records the order in which the next pass prefetches
            hidden, chosen = watched(experts, partial(owner.hidden_states, batch_of()))
            dtypes = {name: str(getattr(param, "ds_tensor", param).dtype) for name, param in backbone.hf_parameters()}
            if divided:
                owner.close()
            answers[kind, tp, divided, offload] = hidden.numpy(), chosen.numpy(), dtypes
    return answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtures")
    for number, kind in enumerate(KINDS):
        write_mixture(path / kind, kind, packed=number % 2 == 1)
    return path


def test_routers_have_the_dtype_of_transformers_in_every_layout(fresh_pool, folder):
    from transformers import AutoModelForCausalLM

    answers = fresh_pool(2).run(run_layouts, timeout_s=300, folder=folder)
    batch = batch_of()
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    for kind in KINDS:
        one = load_backbone(spec_of(folder, kind), Mesh(), vocab_size=99, trainable=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder / kind, dtype=torch.bfloat16, experts_implementation=one.config._experts_implementation
        ).eval()
        dtypes = {name: str(param.dtype) for name, param in model.named_parameters()}
        want, chosen = watched([module for _, module in expert_modules(model)], partial(stock_hidden, model, inputs))
        for answer, (tp, divided, offload) in itertools.product(answers, LAYOUTS):
            hidden, routes, found = answer[kind, tp, divided, offload]
            what = f"{kind}, tp {tp}{', ZeRO-3' * divided}{', in host memory' * offload}"
            assert found == dtypes, what
            hidden, same = torch.from_numpy(hidden), torch.from_numpy(routes) == chosen
            if tp == 1:
                assert torch.equal(hidden, want), what
                assert same.all(), what
            else:  # sums of bfloat16 in another order route one or two tokens differently
                assert float((hidden - want).norm() / want.norm()) < 5e-2, what
                assert same.float().mean() > 0.95, what


def stock_hidden(model, inputs):
    return model.base_model(**inputs).last_hidden_state.flatten(0, 1)
