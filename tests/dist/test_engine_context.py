"""Sequences cut over cp ranks: the same steps, gradients and weights as plain torch, in student and teacher."""

import importlib.util
import sys
from pathlib import Path

import pytest

from kdtrain.models.tiny import tiny_config

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

LAWS = Path(__file__).with_name("test_engine_layouts.py")
WINDOW = 4
"""Less than the 6 tokens of a part: windows begin on one rank and end on the other."""
FAMILIES = {
    "gemma3_window": tiny_config(
        "gemma3", sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=None, tie_word_embeddings=True,
    ),
    "llama_one_kv": tiny_config("llama", num_attention_heads=4, num_key_value_heads=1),
}  # fmt: skip


def laws():
    """The file with the steps of plain torch, loaded by path once per process; its families and ours."""
    name = "layout_laws"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, LAWS)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        sys.modules[name].FAMILIES.update(FAMILIES)
    return sys.modules[name]


def cases():
    """World size -> layouts. In every other sequence a document crosses the cut, in the others all of it does."""
    case = laws().Case
    return {
        2: [
            *(case("qwen3", 1, stage, (8, 1, 3), cp=2) for stage in (0, 1, 2, 3)),
            case("gpt_neox", 1, 3, (3, 8, 1), cp=2, recompute=True),
            case("gemma3_window", 1, 1, (8, 1, 3), cp=2),
            case("llama_one_kv", 1, 2, (1, 8, 3), cp=2, recompute=True),
            case("gpt_neox", 1, 1, (8, 3, 1), cp=2, teacher="plain overlap"),
            case("qwen3", 1, 3, (3, 8, 1), cp=2, teacher="plain zero3"),
        ],
        4: [
            case("qwen3", 2, 2, (8, 1, 3), cp=2, recompute=True),
            case("gemma3_window", 2, 3, (3, 8, 1), cp=2, sequence=True),
            case("qwen3", 1, 1, (4, 1, 3), cp=2, teacher="plain zero3"),
            case("qwen3", 1, 0, (8, 3, 1), cp=4),
            case("gpt_neox", 2, 0, (8, 1, 3), cp=2, teacher="plain"),
            case("qwen3", 2, 1, (3, 1, 8), cp=2, teacher="tp"),
            case("qwen3", 2, 2, (8, 3, 1), cp=2, teacher="tp zero3"),
        ],
    }


def run_cases(rank, world_size, folder):
    return laws().run_cases(rank, world_size, folder, cases()[world_size])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("context")


@pytest.fixture(scope="module")
def oracles(folder):
    return {what: laws().oracle(folder, *what) for what in {case.what for some in cases().values() for case in some}}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_share_sequences_make_the_steps_of_plain_torch(world_size, fresh_pool, folder, oracles):
    answers = fresh_pool(world_size).run(run_cases, timeout_s=400, folder=folder)
    for rank in range(world_size):
        assert answers[rank] == answers[0], "ranks disagree about a loss or a norm"
    for case, answer in zip(cases()[world_size], answers[0], strict=True):
        laws().check_case(case, answer, oracles[case.what], folder / case.name)


def hand_over(rank, world_size, folder):
    """Three steps in three layouts, each from the checkpoint of the one before; the last checkpoint."""
    from kdtrain.dist.mesh import Mesh
    from kdtrain.engine import checkpoint

    test = laws()
    test.join(world_size)
    last = None
    for step, (cp, stage) in enumerate(((2, 3), (1, 2), (2, 3)), 1):
        case = test.Case("gemma3_window", 1, stage, (8 // (2 // cp),) * 3, cp=cp)
        mesh = Mesh.build(1, cp)
        engine = test.start_engine(folder, mesh, case)
        if last is not None:
            assert checkpoint.load(last, engine) == {"made": step - 1}
        loss, result = test.make_step(engine, step, case.micro[0])
        last = checkpoint.save(folder / "handed_over", engine, step=step, state={"made": step})
        engine.close()
    return last, loss, result.grad_norm


def test_a_run_goes_on_over_another_number_of_cp_ranks(fresh_pool, folder, oracles):
    from kdtrain.engine.slices import CheckpointReader

    last, loss, norm = fresh_pool(2).run(hand_over, folder=folder)[0]
    want = oracles["gemma3_window", False]
    assert (loss, norm) == pytest.approx(want.steps[-1], rel=1e-5)
    with CheckpointReader(last) as found:
        assert found.manifest.layout == {"tp": 1, "dp": 1, "cp": 2, "zero_stage": 3, "dtype": "float32"}
        assert sorted(found.names()) == sorted(want.weights)
        for name in found.names():
            right = want.weights[name][: found.manifest.parameters[name].shape[0]]
            assert (found.read_full(name, "master") - right).abs().max() < 1e-5, name
