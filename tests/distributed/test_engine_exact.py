"""Bitwise properties of engine steps, and errors: float32 sums under bfloat16, non-finite steps, missing marks."""

import pytest
import torch

from kdtrain.errors import EXIT_DATA, DataError, ParallelError
from tests.support.layout_steps import (
    Case,
    build_backbone,
    configuration,
    engine_of,
    join,
    micro_batches,
    objective_of,
    step_batch,
    student_of,
)

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

REPEATS = 16  # a power of two, and sums of up to 16 equal bfloat16 numbers are exact in float32, not in bfloat16

# (tp, ZeRO stage, dtype, AdamW in host memory)
NON_FINITE = [
    *((1, stage, "float32", False) for stage in (0, 1, 2, 3)),
    (2, 0, "float32", False),
    *((2, stage, "bfloat16", False) for stage in (1, 2, 3)),
    (1, 1, "float32", True),
    (2, 2, "float32", True),
    (1, 2, "bfloat16", True),
    (2, 3, "bfloat16", True),
]


def fragments(engine):
    """This rank's part of master weights and moments, and AdamW's step counts."""
    from kdtrain.engine import zero_state

    found = {fragment.as_slice().key: fragment.tensor.clone() for fragment in zero_state.local_fragments(engine)}
    return found, zero_state.local_adam_steps(engine)


def differences(one, other):
    assert one[0].keys() == other[0].keys()
    found = [key for key, value in one[0].items() if not torch.equal(value, other[0][key])]
    return found + [name for name, step in one[1].items() if other[1][name] != step]


def moments(engine):
    return {key: value for key, value in fragments(engine)[0].items() if "|exp_avg|" in key}


def gradients_of_step(engine, parts, total):
    """exp_avg after one step of these micro-batches, and the norm that the engine reported."""
    for part in parts:
        engine.backward(objective_of(engine)(part).loss_sum, total)
    result = engine.step(1e-3)
    assert result.applied
    return moments(engine), result.grad_norm


def repeated_micro_batches(rank, world_size, folder):
    """Per ZeRO stage under bfloat16: a batch once, and the same batch 16 times with 16 times the token count."""
    mesh = join(world_size)[2]
    part = step_batch(1).rows(0, 2)
    found = {}
    for stage in (1, 2, 3):
        answers = []
        for repeats in (1, REPEATS):
            case = Case("qwen3", 2, stage, (0, 0, 0), dtype="bfloat16")
            engine = engine_of(student_of(folder, mesh, case), mesh, case, clip=None)
            answers.append(gradients_of_step(engine, [part] * repeats, 18.0 * repeats))
            engine.close()
        (once, norm), (often, same_norm) = answers
        assert norm == same_norm
        found[stage] = [key for key in once if not torch.equal(once[key], often[key])]
        assert any(value.any() for value in once.values())
    return found


def test_gradients_under_bfloat16_accumulate_in_float32(fresh_pool, tmp_path):
    for found in fresh_pool(2).run(repeated_micro_batches, folder=tmp_path):
        assert found == {1: [], 2: [], 3: []}


def two_micro_batches(rank, world_size, folder, save_to):
    """Two micro-batches of unequal token counts: one on each of two data ranks, or both on one rank."""
    from kdtrain.engine import checkpoint

    mesh = join(world_size)[1]
    batch = step_batch(1).rows(3, 5)  # 7 and 10 valid tokens
    parts = [batch.rows(0, 1), batch.rows(1, 2)]
    norms = []
    for stage in (1, 2, 3):
        case = Case("llama", 1, stage, (0, 0, 0), dtype="bfloat16")
        engine = engine_of(student_of(folder, mesh, case), mesh, case, clip=None)
        mine = parts if world_size == 1 else [parts[rank]]
        norms.append(gradients_of_step(engine, mine, 16.0)[1])  # a power of two: dividing by it is exact
        checkpoint.save(folder / f"{save_to}{stage}", engine, step=1, state={})
        engine.close()
    return norms


def test_gradients_under_bfloat16_are_reduced_over_data_ranks_in_float32(fresh_pool, tmp_path):
    from kdtrain.engine.slices import CheckpointReader

    alone = fresh_pool(1).run(two_micro_batches, folder=tmp_path, save_to="alone")[0]
    shared = fresh_pool(2).run(two_micro_batches, folder=tmp_path, save_to="shared")[0]
    assert shared == pytest.approx(alone, rel=1e-6)
    for stage in (1, 2, 3):
        with (
            CheckpointReader(tmp_path / f"alone{stage}" / "step_000001") as want,
            CheckpointReader(tmp_path / f"shared{stage}" / "step_000001") as got,
        ):
            for name in want.names():
                right = want.read_full(name, "exp_avg")
                assert right.any()
                assert torch.equal(got.read_full(name, "exp_avg"), right), f"ZeRO {stage}: {name}"


def non_finite_steps(rank, world_size, folder):
    """Two steps whose gradient is NaN or inf on rank 0 only, then a finite one; a second engine makes only that one."""
    meshes = join(world_size)
    for tp, stage, dtype, offload in NON_FINITE:
        mesh = meshes[tp]
        case = Case("llama_untied", tp, stage, (0, 0, 0), dtype=dtype)
        engine = engine_of(student_of(folder, mesh, case), mesh, case, offload=offload)
        for factor in (float("nan"), float("inf"), 1.0):
            before = fragments(engine)
            for part in micro_batches(step_batch(1), mesh, 2 if offload else 4):
                loss = objective_of(engine)(part).loss_sum
                engine.backward(loss * factor if rank == 0 else loss, 39.0)
            result = engine.step(1e-3)
            where = (case.name, offload, factor)
            assert result.applied == (factor == 1.0), where
            changed = bool(differences(before, fragments(engine)))
            assert changed == (result.applied and bool(before[0])), where  # a rank may hold no part of the states
            assert (result.grad_norm < float("inf")) == result.applied, where
        twin = engine_of(student_of(folder, mesh, case), mesh, case, offload=offload)
        for part in micro_batches(step_batch(1), mesh, 2 if offload else 4):
            twin.backward(objective_of(twin)(part).loss_sum, 39.0)
        assert twin.step(1e-3) == result
        assert differences(fragments(twin), fragments(engine)) == [], case.name
        engine.close()
        twin.close()


def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(fresh_pool, tmp_path):
    fresh_pool(2).run(non_finite_steps, folder=tmp_path)


def norm_without_marks(rank, world_size, folder):
    """The gradient norm of one step per ZeRO stage, with the marks of sharded parameters and without them."""
    mesh = join(world_size)[2]
    norms = []
    for stage in (1, 2, 3):
        for marked in (True, False):
            case = Case("qwen3", 2, stage, (0, 0, 0))
            engine = engine_of(student_of(folder, mesh, case), mesh, case, clip=None)
            for param in engine.backbone.parameters() if not marked else ():
                param.tensor_model_parallel = False  # after the engine's own check
            norms.append(gradients_of_step(engine, [step_batch(1).rows(0, 4)], 39.0)[1])
            engine.close()
    return norms


def test_without_marks_the_gradient_norm_would_be_wrong(fresh_pool, tmp_path):
    """DeepSpeed counts unmarked parameters on tp rank 0 only, so the engine must refuse them (next test)."""
    answers = fresh_pool(2).run(norm_without_marks, folder=tmp_path)
    assert answers[0] == answers[1]
    for right, wrong in zip(answers[0][::2], answers[0][1::2], strict=True):
        assert right == pytest.approx(answers[0][0], rel=1e-5)
        assert abs(wrong - right) > 0.01 * right


def refused_engines(rank, world_size, folder):
    """Engines with a missing and with a superfluous mark, steps without valid tokens, and steps without clipping."""
    from kdtrain.engine.zero import StudentEngine
    from kdtrain.jobs.build.models import engine_settings

    mesh = join(world_size)[2]
    messages = []
    for name, mark in (("model.layers.1.mlp.up_proj.weight", False), ("model.norm.weight", True)):
        backbone = build_backbone(folder, "llama", mesh)
        dict(backbone.hf_parameters())[name].tensor_model_parallel = mark
        with pytest.raises(ParallelError) as refused:
            StudentEngine(backbone, mesh, engine_settings(configuration(1)), device=torch.device("cpu"))
        messages.append(str(refused.value))
    norms = []
    for stage in (0, 1, 2, 3):
        case = Case("llama", 2, stage, (0, 0, 0))
        engine = engine_of(student_of(folder, mesh, case), mesh, case, clip=None)
        part = step_batch(1).rows(0, 4)
        with pytest.raises(DataError) as refused:
            engine.backward(objective_of(engine)(part).loss_sum, 0.0)
        messages.append(str(refused.value))
        gradient, norm = gradients_of_step(engine, [part], 1.0)  # summed, not averaged: far above any default clip
        squares = sum(float((value.double() / 0.1).square().sum()) for value in gradient.values())
        norms.append((norm, squares))
        engine.close()
    return messages, norms


def test_wrong_marks_and_empty_steps_are_refused_and_clip_none_does_not_clip(fresh_pool, tmp_path):
    assert DataError.exit_code == EXIT_DATA
    answers = fresh_pool(2).run(refused_engines, folder=tmp_path)
    for messages, _ in answers:
        assert messages[0].startswith(
            "model.layers.1.mlp.up_proj.weight is cut over tp, but tensor_model_parallel is Fa"
        )
        assert messages[1].startswith("model.norm.weight is replicated over tp, but tensor_model_parallel is True")
        assert len(messages) == 6
        assert all("0 valid tokens" in message for message in messages[2:])
    for stage in range(4):
        norm = answers[0][1][stage][0]
        whole = sum(answer[1][stage][1] for answer in answers) ** 0.5
        assert norm > 10
        assert norm == pytest.approx(whole, rel=1e-5), f"ZeRO {stage}: clipped, or the norm is not the gradient's"
