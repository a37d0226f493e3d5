"""AdamW in host memory (zero.offload_optimizer): the same run, to rounding, in every stage and through checkpoints."""

import pytest
import torch

from tests.support.layout_oracle import check_case, oracle
from tests.support.layout_steps import (
    MAX_NORM,
    Case,
    engine_of,
    join,
    make_step,
    objective_of,
    step_batch,
    student_of,
    three_steps,
)

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]


def cases():
    """Both layouts of two ranks at every stage, and two families whose embeddings are tied and not."""
    found = [Case("llama", tp, stage, (4, 1, 3)) for tp in (1, 2) for stage in (1, 2, 3)]
    return [*found, Case("llama_untied", 2, 2, (1, 8, 3), recompute=True)]


def start(folder, mesh, case, *, offload=True, clip=MAX_NORM):
    return engine_of(student_of(folder, mesh, case), mesh, case, clip=clip, offload=offload)


def run_cases(rank, world_size, folder):
    """Per case the input of `layout_oracle.check_case`."""
    meshes = join(world_size)
    answers = []
    for case in cases():
        engine = start(folder, meshes[case.tp], case)
        assert engine.optimizer.defaults["fused"]
        answers.append(three_steps(engine, None, case, folder / case.name))
        engine.close()
    return answers


def test_every_stage_makes_the_steps_of_plain_torch(fresh_pool, tmp_path):
    answers = fresh_pool(2).run(run_cases, folder=tmp_path)
    oracles = {family: oracle(tmp_path, family, False) for family in ("llama", "llama_untied")}
    assert answers[0] == answers[1], "ranks disagree about a loss or a norm"
    for case, answer in zip(cases(), answers[0], strict=True):
        check_case(case, answer, oracles[case.family], tmp_path / case.name)


def fragments(engine):
    from kdtrain.engine import zero_state

    found = {fragment.as_slice().key: fragment.tensor.clone() for fragment in zero_state.local_fragments(engine)}
    return found | {name: torch.tensor(step) for name, step in zero_state.local_adam_steps(engine).items()}


def error(one, other):
    """Largest deviation of any tensor, as a part of the tensor's norm."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).norm() / (other[key].norm() + 1e-12)) for key in one if "|" in key)


def bfloat16_steps(rank, world_size, folder):
    """One step of four micro-batches with and without offload, and 16 equal micro-batches against one."""
    meshes = join(world_size)
    found = {}
    for tp, stage in ((1, 1), (2, 2), (1, 3)):
        case = Case("llama", tp, stage, (1, 1, 1), dtype="bfloat16")
        answers = []
        for offload in (True, False):
            engine = start(folder, meshes[tp], case, offload=offload)
            loss, result = make_step(engine, 1, 1)
            answers.append((loss, result.grad_norm, fragments(engine)))
            engine.close()
        (loss, norm, on), (same_loss, same_norm, off) = answers
        assert loss == same_loss
        part, sums = step_batch(1).rows(0, 2), []
        for repeats in (1, 16):
            engine = start(folder, meshes[tp], case, clip=None)
            for _ in range(repeats):
                engine.backward(objective_of(engine)(part).loss_sum, 18.0 * repeats)
            assert engine.step(1e-3).applied
            sums.append({key: value for key, value in fragments(engine).items() if "|exp_avg|" in key})
            engine.close()
        same = all(torch.equal(sums[1][key], value) for key, value in sums[0].items())
        found[tp, stage] = abs(norm / same_norm - 1), error(on, off), same
    return found


@pytest.mark.slow
def test_bfloat16_gradients_accumulate_in_float32_on_host(fresh_pool, tmp_path):
    for answer in fresh_pool(2).run(bfloat16_steps, folder=tmp_path):
        for layout, (norm, state, same) in answer.items():
            assert norm < 1e-6, layout
            assert state < 1e-6, layout
            assert same, layout


def checkpoints(rank, world_size, folder):
    """Two steps, a save, a load into the other kind of engine, one more step in both; a resume of the same kind."""
    from kdtrain.engine import checkpoint

    meshes = join(world_size)
    found = {}
    for tp, stage, dtype in ((1, 2, "bfloat16"), (2, 3, "float32")):
        case = Case("llama", tp, stage, (1, 1, 1), dtype=dtype)
        for offload in (False, True):
            root = folder / f"{case.name}-{offload}"
            engine = start(folder, meshes[tp], case, offload=offload)
            for step in (1, 2):
                make_step(engine, step, 1)
            saved = fragments(engine)
            path = checkpoint.save(root, engine, step=2, state={})
            last = make_step(engine, 3, 1), fragments(engine)
            engine.close()
            for target in (False, True):
                other = start(folder, meshes[tp], case, offload=target)
                make_step(other, 1, 2)
                checkpoint.load(path, other)
                loaded = fragments(other)
                assert loaded.keys() == saved.keys()
                assert all(torch.equal(loaded[key], saved[key]) for key in saved), (case, offload, target)
                again = make_step(other, 3, 1), fragments(other)
                assert again[0][0] == last[0][0], "the working weights differ"
                if target == offload:
                    assert again[0] == last[0]
                    assert all(torch.equal(again[1][key], last[1][key]) for key in saved), (case, offload)
                else:
                    found[case.name, offload] = (
                        error(again[1], last[1]),
                        again[0][1].grad_norm / last[0][1].grad_norm - 1,
                    )
                other.close()
    return found


@pytest.mark.slow
def test_checkpoints_load_with_and_without_offload(fresh_pool, tmp_path):
    for answer in fresh_pool(2).run(checkpoints, folder=tmp_path):
        assert len(answer) == 4
        for case, (state, norm) in answer.items():
            assert state < 1e-6, case
            assert abs(norm) < 1e-6, case


def threads_of_steps(rank, world_size, folder):
    """Threads outside a step, and inside: with 6 cores to share, and with a number that the user chose."""
    import os

    os.sched_getaffinity = lambda _: set(range(6))
    meshes, found = join(world_size), []
    for chosen in (None, "5"):
        os.environ.update({"OMP_NUM_THREADS": chosen or "1", "TORCHELASTIC_RUN_ID": "none"})
        engine = start(folder, meshes[1], Case("llama", 1, 2, (1, 1, 1)))
        inside = []
        engine.optimizer.register_step_pre_hook(lambda *_, seen=inside: seen.append(torch.get_num_threads()))
        outside = torch.get_num_threads()
        make_step(engine, 1, 1)
        found.append((outside, set(inside), torch.get_num_threads()))
        engine.close()
    return found


def test_host_step_uses_ranks_part_of_cores(fresh_pool, tmp_path):
    for answer in fresh_pool(2).run(threads_of_steps, folder=tmp_path):
        assert answer == [(1, {3}, 1), (1, {1}, 1)]
