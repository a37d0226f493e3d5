"""attention=packed under DeepSpeed: the steps that plain torch makes with masks, in layouts that move parameters."""

import pytest

from tests.support.layout_oracle import check_case, oracle
from tests.support.layout_steps import Case, run_cases

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

CASES = [
    Case("llama", 1, 3, (4, 1, 3), recompute=True, attention="packed"),
    Case("qwen3", 2, 3, (3, 8, 1), sequence=True, recompute=True, attention="packed"),
    Case("gemma3", 1, 2, (4, 1, 3), attention="packed"),
    Case("sinks", 1, 3, (4, 1, 3), attention="packed"),
    Case("sinks", 1, 3, (3, 4, 1), recompute=True, attention="packed"),
    Case("sinks", 2, 1, (8, 1, 3), recompute=True, attention="packed"),
    Case("qwen3", 1, 1, (8, 1, 3), cp=2, attention="packed", teacher="plain zero3 limit24"),
]
"""With sinks, blocks of attention are computed again in the backward pass, from parameters that ZeRO-3 moves."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


def test_packed_attention_makes_the_steps_of_masks_in_every_layout(fresh_pool, folder):
    answers = fresh_pool(2).run(run_cases, timeout_s=400, folder=folder, cases=CASES)
    oracles = {what: oracle(folder, *what) for what in {case.what for case in CASES}}
    for case, answer, other in zip(CASES, *answers, strict=True):
        assert answer == other, "ranks disagree about a loss or a norm"
        check_case(case, answer, oracles[case.what], folder / case.name)
