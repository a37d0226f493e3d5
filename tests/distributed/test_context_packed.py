"""attention=packed over cp ranks: hidden states and gradients of the masked path in one process."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.models.backbone import Backbone
from kdtrain.models.context import use_context
from kdtrain.models.tiny import tiny_config
from kdtrain.parallel import plan_shards, shard_model

pytestmark = pytest.mark.dist

LENGTHS = [[9, 1, 6], [16], [2, 1, 1, 3, 2, 7]]
WINDOW = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "qwen3": tiny_config("qwen3"),
    "gpt_neox": tiny_config("gpt_neox"),
    "gemma3": tiny_config("gemma3", **WINDOW),
    "gemma2": {**tiny_config("llama"), "model_type": "gemma2", "head_dim": 4, "attn_logit_softcapping": 2.0, **WINDOW},
}


def step(name, attention, mesh):
    """(hidden states of this rank's tokens, gradients of its loss) of a stock model from a seed."""
    settings = dict(MODELS[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.config._attn_implementation = attention
    if mesh.cp_size > 1:
        use_context(model, mesh, "it")
    shard = VocabShard.of(101, total_rows=101)
    cuts = plan_shards(model, 1, shard.rows)
    backbone = Backbone(shard_model(model, Mesh(), shard), shard, cuts, mesh.cp_group if mesh.cp_size > 1 else None)
    rng = torch.Generator().manual_seed(2)
    ids, pull = torch.randint(0, 101, (3, 16), generator=rng), torch.randn(3, 16, 32, generator=rng)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    width = 16 // mesh.cp_size
    mine = slice(mesh.cp_rank * width, (mesh.cp_rank + 1) * width)
    ids, positions, pull = ids[:, mine], positions[:, mine], pull[:, mine]
    hidden = backbone.hidden_states(Batch(ids, ids, torch.ones(ids.shape), positions, torch.arange(3)))
    (hidden.view_as(pull) * pull).sum().backward()
    grads = {name: p.grad for name, p in backbone.hf_parameters() if p.grad is not None}
    return hidden.detach().view_as(pull), grads


def compare(rank, world_size, name):
    """Worst relative error of hidden states and of gradients summed over the ranks."""
    mesh = Mesh.build(1, world_size)
    want, want_grads = step(name, "eager", Mesh())
    found, grads = step(name, "packed", mesh)
    width = 16 // world_size
    want = want[:, rank * width : (rank + 1) * width]
    errors = [float((found - want).abs().max() / want.abs().max())]
    for parameter, grad in sorted(grads.items()):
        torch.distributed.all_reduce(grad)
        right = want_grads[parameter]
        errors.append(float((grad - right).norm() / right.norm().clamp(min=1.0)))
    assert grads.keys() == want_grads.keys()
    return max(errors)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_packed_attention_over_ranks_matches_masks_in_one_process(rank_pool, name, world_size):
    assert max(rank_pool(world_size).run(compare, name=name)) < 1e-5
