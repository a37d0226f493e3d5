"""Sequences cut over cp ranks: the same steps, gradients and weights as plain torch, in student and teacher."""

import pytest

from tests.support.layout_oracle import check_case, oracle
from tests.support.layout_steps import Case, engine_of, join, make_step, run_cases, student_of
from tests.support.tiers import slow_cases

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

# In every other sequence a document crosses the cut, in the others all of it does. The windows of Gemma have 4 tokens,
# less than the 6 of a part: they begin on one rank and end on the other.
CASES = {
    2: [
        *(Case("qwen3", 1, stage, (8, 1, 3), cp=2) for stage in (0, 1, 2, 3)),
        Case("gpt_neox", 1, 3, (3, 8, 1), cp=2, recompute=True),
        Case("gemma3", 1, 1, (8, 1, 3), cp=2),
        Case("one_group_untied", 1, 2, (1, 8, 3), cp=2, recompute=True),
        Case("gpt_neox", 1, 1, (8, 3, 1), cp=2, teacher="plain overlap"),
        Case("qwen3", 1, 3, (3, 8, 1), cp=2, teacher="plain zero3"),
    ],
    4: [
        Case("qwen3", 2, 2, (8, 1, 3), cp=2, recompute=True),
        Case("gemma3", 2, 3, (3, 8, 1), cp=2, sequence=True),
        Case("qwen3", 1, 1, (4, 1, 3), cp=2, teacher="plain zero3"),
        Case("qwen3", 1, 0, (8, 3, 1), cp=4),
        Case("gpt_neox", 2, 0, (8, 1, 3), cp=2, teacher="plain"),
        Case("qwen3", 2, 1, (3, 1, 8), cp=2, teacher="tp"),
        Case("qwen3", 2, 2, (8, 3, 1), cp=2, teacher="tp zero3"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("context")


@pytest.fixture(scope="module")
def oracles(folder):
    return {what: oracle(folder, *what) for what in {case.what for some in CASES.values() for case in some}}


@pytest.mark.parametrize("world_size", slow_cases([2, 4], 4))
def test_context_parallel_ranks_make_the_steps_of_plain_torch(world_size, fresh_pool, folder, oracles):
    answers = fresh_pool(world_size).run(run_cases, timeout_s=400, folder=folder, cases=CASES[world_size])
    for rank in range(world_size):
        assert answers[rank] == answers[0], "ranks disagree about a loss or a norm"
    for case, answer in zip(CASES[world_size], answers[0], strict=True):
        check_case(case, answer, oracles[case.what], folder / case.name)


def hand_over(rank, world_size, folder):
    """Three steps in three layouts, each from the checkpoint of the one before; the last checkpoint."""
    from kdtrain.distributed.mesh import Mesh
    from kdtrain.engine import checkpoint

    join(world_size)
    last = None
    for step, (cp, stage) in enumerate(((2, 3), (1, 2), (2, 3)), 1):
        case = Case("gemma3", 1, stage, (8 // (2 // cp),) * 3, cp=cp)
        mesh = Mesh.build(1, cp)
        engine = engine_of(student_of(folder, mesh, case), mesh, case)
        if last is not None:
            assert checkpoint.load(last, engine) == {"made": step - 1}
        loss, result = make_step(engine, step, case.micro[0])
        last = checkpoint.save(folder / "handed_over", engine, step=step, state={"made": step})
        engine.close()
    return last, loss, result.grad_norm


def test_run_continues_with_another_number_of_cp_ranks(fresh_pool, folder, oracles):
    from kdtrain.engine.slices import CheckpointReader

    last, loss, norm = fresh_pool(2).run(hand_over, folder=folder)[0]
    want = oracles["gemma3", False]
    assert (loss, norm) == pytest.approx(want.steps[-1], rel=1e-5)
    with CheckpointReader(last) as found:
        assert found.manifest.layout == {"tp": 1, "dp": 1, "cp": 2, "zero_stage": 3, "dtype": "float32"}
        assert sorted(found.names()) == sorted(want.weights)
        for name in found.names():
            right = want.weights[name][: found.manifest.parameters[name].shape[0]]
            assert (found.read_full(name, "master") - right).abs().max() < 1e-5, name
