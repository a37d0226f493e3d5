"""A bfloat16 student some of whose parameters stay in float32: stages 1 and 2 train them so, stage 3 refuses.

OLMo-Hybrid creates `A_log` of its recurrent layers in float32, under either version of transformers.
"""

import json

import pytest
import torch
import torch.nn.functional as F

from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import checkpoint
from kdtrain.engine.slices import CheckpointReader
from kdtrain.errors import ConfigError
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny import tiny_config
from tests.support.layout_steps import VOCAB, Case, engine_of, join, make_step, step_batch

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

CONFIG = tiny_config(
    "olmo2",
    model_type="olmo_hybrid",
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=4,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    vocab_size=VOCAB,
)
KEPT = "model.layers.0.linear_attn.A_log"


def student(folder, mesh, dtype="bfloat16"):
    path = folder / "olmo_hybrid.json"
    if not path.exists():
        path.write_text(json.dumps(CONFIG))
    return load_backbone(
        ModelSpec(architecture=str(path), dtype=dtype, seed=3), mesh, vocab_size=VOCAB, trainable=True, packed=False
    )


def is_float32(tensor):
    return tensor.dtype == torch.float32 and not torch.equal(tensor, tensor.bfloat16().float())


def steps(rank, world_size, folder):
    """Per layout: the parameter that stays in float32, after steps and after loading a checkpoint."""
    meshes, answers = join(world_size), {}
    for tp, stage, offload in ((1, 1, False), (1, 2, False), (2, 2, False), (1, 2, True)):
        case = Case("olmo_hybrid", tp, stage, (2, 2, 2), dtype="bfloat16")
        name = f"{case.name}{'-offload' * offload}"
        engine = engine_of(student(folder, meshes[tp]), meshes[tp], case, clip=None, offload=offload)
        kept = dict(engine.backbone.hf_parameters())[KEPT]
        first = kept.detach().clone()
        losses = [make_step(engine, 1, 2)[0]]
        checkpoint.save(folder / name, engine, step=1, state={})
        after = kept.detach().clone()
        losses += [make_step(engine, step, 2)[0] for step in (2, 3)]
        checkpoint.load(folder / name / "step_000001", engine)
        restored = torch.equal(kept.detach(), after)
        again = [make_step(engine, step, 2)[0] for step in (2, 3)]
        others = {param.dtype for name, param in engine.backbone.hf_parameters() if name != KEPT}
        with CheckpointReader(folder / name / "step_000001") as reader:
            cut = engine.backbone.cuts.get(KEPT)
            master = reader.read_shard(KEPT, "master", cut, engine.mesh.tp_rank)
        answers[name] = {
            "float32": is_float32(first) and is_float32(after),
            "is master": torch.equal(after, master),
            "restored": restored,
            "again": again == losses[1:],
            "others": others,
        }
        engine.close()
    return answers


def test_float32_parameters_of_bfloat16_model_train_in_float32(fresh_pool, tmp_path):
    whole = student(tmp_path, Mesh())
    assert whole.info().float32 == (KEPT,)
    batch = step_batch(1)
    plain_loss(whole, batch).backward()
    want = dict(whole.hf_parameters())[KEPT].grad
    assert is_float32(want)
    for answers in fresh_pool(2).run(steps, timeout_s=300, folder=tmp_path):
        for name, found in answers.items():
            assert found["float32"], f"{name}: {KEPT} was rounded"
            assert found["is master"], f"{name}: the working copy is not the float32 weight"
            assert found["restored"], f"{name}: a checkpoint brought it back rounded"
            assert found["again"], f"{name}: steps after loading differ"
            assert found["others"] == {torch.bfloat16}, name
            with CheckpointReader(tmp_path / name / "step_000001") as reader:
                got = reader.read_full(KEPT, "exp_avg") / 0.1
            error = float((got - want).norm() / want.norm())
            limit = 2e-2 if "tp2" in name else 4e-3 if "zero2" in name else 1e-6  # a bfloat16 unit is 4e-3
            assert error < limit, f"{name}: its gradient is off by {error:.1e}"


def plain_loss(backbone, batch):
    """Cross-entropy per valid token, of one process."""
    logits = F.linear(backbone.hidden_states(batch).float(), backbone.lm_head_shard.weight[:VOCAB].float())
    losses = F.cross_entropy(logits, batch.labels.flatten(), reduction="none")
    return (losses * batch.loss_mask.flatten()).sum() / batch.loss_mask.sum()


def at_stage_3(rank, world_size, folder):
    mesh = join(world_size)[1]
    try:
        engine_of(student(folder, mesh), mesh, Case("olmo_hybrid", 1, 3, (2, 2, 2), dtype="bfloat16"))
    except ConfigError as error:
        message = str(error)
    engine = engine_of(student(folder, mesh, "float32"), mesh, Case("olmo_hybrid", 1, 3, (2, 2, 2)))
    loss = make_step(engine, 1, 2)[0]
    engine.close()
    return message, loss


def test_stage_3_refuses_float32_parameters_of_bfloat16_model(fresh_pool, tmp_path):
    student(tmp_path, Mesh())
    for message, loss in fresh_pool(1).run(at_stage_3, folder=tmp_path):
        assert f"zero.stage = 3 and student.dtype = bfloat16 do not go together here: {KEPT!r}" in message
        assert "fix: set zero.stage=2" in message
        assert loss > 0
