"""The tensor-parallel layers under DeepSpeed ZeRO: gradients of norms inside attention, and the head of ZeRO-3."""

import copy
from pathlib import Path

import pytest
import torch

from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.models.backbone import Backbone, call_with_head
from kdtrain.models.load import enable_activation_checkpointing
from kdtrain.parallel import merge_state_dict, plan_cuts, shard_model
from kdtrain.testing.ranks import RankPool, load_file

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

FAMILY, CHANGES = "qwen3", {"tie_word_embeddings": True}
VOCAB, ROWS = 299, 301


@pytest.fixture(scope="module")
def zero_pool():
    pool = RankPool(4, preload=("torch", "deepspeed"))
    yield pool
    pool.close()


def settings(stage):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's default clips at 1
        "steps_per_print": 1_000_000,
    }


def gradients_under_zero(rank, world_size, helpers, stages):
    """Per stage: this rank's gradients at tp 2 x dp 2, read off one SGD step of length 1, loss and gradient norm.

    A last answer has the first stage with the marks of cut parameters forgotten.
    """
    import deepspeed
    import deepspeed.ops

    test = load_file(helpers)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled
    deepspeed.init_distributed("gloo")
    mesh = Mesh.build(2)
    return [
        *(one_stage(deepspeed, test, mesh, stage) for stage in stages),
        one_stage(deepspeed, test, mesh, stages[0], forget_marks=True),
    ]


def one_stage(deepspeed, test, mesh, stage, forget_marks=False):
    model = test.stock_model(FAMILY, **CHANGES)
    shard = VocabShard.of(VOCAB, mesh.tp_rank, mesh.tp_size, total_rows=ROWS)
    cuts = plan_cuts(model, mesh.tp_size, shard.rows)
    backbone = Backbone(shard_model(model, mesh, shard), shard, cuts).train()
    enable_activation_checkpointing(backbone.model)
    for param in backbone.parameters() if forget_marks else ():
        param.tensor_model_parallel = False
    before = {name: param.detach().clone() for name, param in backbone.hf_parameters()}
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(
        model=backbone, optimizer=optimizer, config=copy.deepcopy(settings(stage)), mpu=mesh
    )
    batch = test.packed_batch().rows(mesh.dp_rank, mesh.dp_rank + 1)
    parts = call_with_head(engine, batch, test.cross_entropy_head(batch, shard, mesh.tp_group))
    assert isinstance(parts, test.Parts)
    engine.backward(parts.loss * mesh.dp_size)
    engine.step()
    grads = {}
    for name, param in backbone.hf_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=stage == 3):
            grads[name] = (before[name] - param.detach()).numpy()
    norm = float(engine.get_global_grad_norm())
    engine.destroy()
    return grads, float(parts.ce.sum()), norm


def test_every_zero_stage_sees_whole_gradients(zero_pool):
    helpers = str(Path(__file__).with_name("test_parallel_tp.py"))
    stages = (1, 2, 3)
    answers = zero_pool.run(gradients_under_zero, helpers=helpers, stages=stages)
    test = load_file(helpers)
    _, _, want = test.reference(FAMILY, CHANGES, "ce")
    norm = torch.stack([grad.norm() for grad in want.values()]).norm()
    shard = VocabShard.of(VOCAB, 0, 2, total_rows=ROWS)
    cuts = plan_cuts(test.stock_model(FAMILY, **CHANGES), 2, shard.rows)
    for index, stage in enumerate(stages):
        for tp_ranks in ((0, 1), (2, 3)):
            local = [{n: torch.from_numpy(g) for n, g in answers[r][index][0].items()} for r in tp_ranks]
            got = merge_state_dict(local, cuts)
            for name, grad in want.items():
                # weights of order 1 minus a gradient: the subtraction rounds at 1e-7 of the weight
                assert test.relative_error(got[name], grad) < 3e-5, (stage, name)
        for rank in range(4):
            assert answers[rank][index][2] == pytest.approx(float(norm), rel=1e-5), f"stage {stage}: gradient norm"
    forgotten = answers[0][-1][2]
    assert abs(forgotten - float(norm)) > 0.01 * float(norm), "forgetting the marks would go unnoticed"
