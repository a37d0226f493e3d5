"""Architectures that need more than one contiguous piece per parameter, through the engine: against plain torch.

Fused projections, Conv1D, outputs gathered for a norm over the whole width, key/value heads that ranks share. Loss,
gradient norm, every gathered gradient, three steps, and a checkpoint that another tp continues.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from kdtrain.engine import checkpoint
from kdtrain.jobs.export_hf import export_checkpoint
from kdtrain.testing.ranks import ENGINE_MODULES, RankPool
from tests.support.layout_oracle import check_case, oracle
from tests.support.layout_steps import (
    SEQUENCES,
    VOCAB,
    Case,
    build_backbone,
    engine_of,
    evaluate,
    join,
    make_step,
    run_cases,
    step_batch,
)
from tests.support.tiers import slow_cases
from tests.support.tiny_data import write_tokenizer

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]


CASES = {
    2: [
        Case("gpt2", 2, 1, (8, 1, 4)),
        Case("gpt2", 2, 3, (3, 8, 1), recompute=True),
        Case("phi3", 2, 2, (8, 3, 1)),
        Case("phi3", 2, 0, (1, 8, 4)),
        Case("olmo2", 2, 1, (8, 3, 1), recompute=True),
        Case("olmo2", 2, 3, (8, 3, 1)),
        Case("one_group", 2, 2, (3, 8, 1)),
    ],
    4: [
        Case("few_groups", 4, 0, (8, 1, 4)),
        Case("few_groups", 4, 1, (8, 1, 4), recompute=True),
        Case("few_groups", 4, 3, (3, 8, 1)),
        Case("one_group", 4, 2, (8, 4, 1)),
        Case("uneven_groups", 4, 1, (8, 8, 8)),
        Case("one_group", 2, 1, (4, 1, 3)),
    ],
}


def continue_cases(rank, world_size, folder, cases):
    """[losses and norms of steps 2 and 3], an evaluation, of each (case, tp) from the case's checkpoint of step 1."""
    meshes = join(world_size)
    answers = []
    for case, tp in cases:
        engine = engine_of(build_backbone(folder, case.family, meshes[tp]), meshes[tp], case)
        checkpoint.load(folder / case.name / "step_000001", engine)
        micro = SEQUENCES * tp // world_size
        steps = [make_step(engine, step, micro) for step in (2, 3)]
        answers.append(([(loss, result.grad_norm) for loss, result in steps], evaluate(engine)))
        engine.close()
    return answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture(scope="module")
def oracles(folder):
    families = {case.family for cases in CASES.values() for case in cases}
    return {family: oracle(folder, family, False) for family in families}


@pytest.fixture(scope="module")
def trained(folder):
    """trained(world_size) -> every rank's answers to its cases, which run once; their checkpoints are in `folder`."""

    @cache
    def train(world_size):
        pool = RankPool(world_size, preload=ENGINE_MODULES)
        try:
            return pool.run(run_cases, folder=folder, cases=CASES[world_size])
        finally:
            pool.close()

    return train


@pytest.mark.parametrize("world_size", slow_cases(CASES, 4))
def test_every_architecture_makes_the_steps_of_plain_torch(world_size, trained, folder, oracles):
    answers = trained(world_size)
    for rank in range(world_size):
        assert answers[rank] == answers[0], "ranks disagree about a loss or a norm"
    for case, answer in zip(CASES[world_size], answers[0], strict=True):
        check_case(case, answer, oracles[case.family], folder / case.name)


CONTINUED = {1: [("few_groups", 1), ("phi3", 1)], 2: [("few_groups", 2), ("gpt2", 1), ("olmo2", 1)]}
"""World size -> (family, tp) that continues from a checkpoint of the first of the family's cases."""


@pytest.mark.slow
@pytest.mark.parametrize("world_size", CONTINUED)
def test_another_tp_continues_from_a_checkpoint(world_size, trained, fresh_pool, folder, oracles):
    for trained_on in CASES:
        trained(trained_on)
    every = [case for cases in CASES.values() for case in cases]
    cases = [(next(c for c in every if c.family == family), tp) for family, tp in CONTINUED[world_size]]
    answers = fresh_pool(world_size).run(continue_cases, folder=folder, cases=cases)
    for (case, tp), (steps, evaluation) in zip(cases, answers[0], strict=True):
        want = oracles[case.family]
        for step, right in zip(steps, want.steps[1:], strict=True):
            assert step == pytest.approx(right, rel=1e-5), (case.name, tp)
        assert evaluation == pytest.approx(want.evaluation, rel=1e-5), (case.name, tp)


@pytest.mark.slow
def test_export_of_sharded_architecture_is_stock_model(trained, folder, oracles):
    """Exported fused, transposed and shared shards, read by transformers alone, over all rows."""
    for trained_on in CASES:
        trained(trained_on)
    write_tokenizer(folder / "model", more=[f"<{token}>" for token in range(257, VOCAB)])
    for family in ("gpt2", "phi3", "few_groups", "olmo2"):
        case = next(case for cases in CASES.values() for case in cases if case.family == family and case.tp > 1)
        out = export_checkpoint(folder / case.name / "step_000003", folder / f"{family}_hf", dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="sdpa").eval()
        batch = step_batch(9)
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        loss = (losses * batch.loss_mask.flatten()).sum() / batch.loss_mask.sum()
        assert float(loss) == pytest.approx(oracles[family].evaluation, rel=1e-5), case.name
