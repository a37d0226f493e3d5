"""Three optimizer steps under DeepSpeed in many layouts, against plain torch: whole logits, autograd, AdamW."""

import pytest

from tests.support.layout_oracle import check_case, oracle
from tests.support.layout_steps import Case, run_cases
from tests.support.tiers import slow_cases

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

CASES = {
    1: [
        Case("llama", 1, 0, (8, 8, 8)),
        Case("llama_untied", 1, 1, (1, 1, 1)),
        Case("qwen3_tied", 1, 2, (8, 1, 3)),
        Case("gpt_neox", 1, 3, (1, 8, 3), recompute=True),
        Case("llama", 1, 2, (8, 3, 1), teacher="plain"),
    ],
    2: [
        *(Case("llama", 2, stage, (8, 1, 4)) for stage in (0, 1, 2, 3)),
        *(Case("llama", 1, stage, (4, 1, 3)) for stage in (0, 1, 2, 3)),
        Case("llama_untied", 2, 1, (8, 8, 8), recompute=True),
        Case("qwen3", 2, 2, (1, 1, 8)),
        Case("gpt_neox_tied", 2, 3, (3, 8, 1)),
        *(Case("llama", 2, 1, (8, 1, 3), teacher=layout) for layout in ("plain", "tp", "plain zero3", "tp zero3")),
        *(Case("llama", 1, stage, (4, 1, 3), teacher="tp2") for stage in (1, 3)),
        Case("llama", 1, 0, (4, 1, 3), teacher="plain zero3 offload"),
        Case("llama", 2, 3, (3, 8, 1), teacher="plain"),
        Case("gpt_neox", 2, 1, (8, 1, 3), sequence=True),
        Case("qwen3", 2, 2, (3, 8, 1), sequence=True, recompute=True, teacher="tp"),
        Case("llama", 2, 3, (1, 3, 8), sequence=True, teacher="plain"),
        Case("qwen3", 2, 3, (3, 8, 1), sequence=True, recompute=True, dtype="bfloat16"),
        Case("llama", 1, 0, (4, 1, 3), teacher="plain"),
        Case("llama", 2, 1, (8, 1, 4), dtype="bfloat16"),
        Case("llama_untied", 1, 2, (1, 3, 4), dtype="bfloat16"),
        Case("qwen3", 2, 3, (3, 8, 1), recompute=True, dtype="bfloat16"),
    ],
    4: [
        Case("gpt_neox", 2, 0, (4, 2, 1)),
        Case("llama_untied", 2, 1, (1, 4, 2)),
        Case("qwen3", 2, 2, (2, 4, 3), recompute=True),
        Case("qwen3_tied", 2, 3, (1, 2, 4)),
        Case("llama_untied", 1, 3, (1, 2, 2)),
        Case("llama", 2, 2, (3, 1, 4), teacher="plain"),
        Case("llama", 2, 1, (4, 1, 3), teacher="tp zero3"),
        Case("llama", 2, 3, (4, 2, 1), teacher="tp4"),
        Case("llama", 2, 1, (1, 2, 4), teacher="tp4", sequence=True),
        Case("llama", 4, 1, (3, 1, 8), teacher="tp"),  # nine query heads, two ranks share a key/value head
        Case("llama", 1, 2, (1, 2, 2), teacher="tp4"),
        Case("llama", 1, 1, (2, 1, 2), teacher="tp2 zero3"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def oracles(folder):
    return {what: oracle(folder, *what) for what in {case.what for cases in CASES.values() for case in cases}}


@pytest.mark.parametrize("world_size", slow_cases(CASES, 4))
def test_every_layout_makes_the_steps_of_plain_torch(world_size, fresh_pool, folder, oracles):
    answers = fresh_pool(world_size).run(run_cases, timeout_s=400, folder=folder, cases=CASES[world_size])
    for rank in range(world_size):
        assert answers[rank] == answers[0], "ranks disagree about a loss or a norm"
    for case, answer in zip(CASES[world_size], answers[0], strict=True):
        check_case(case, answer, oracles[case.what], folder / case.name)
