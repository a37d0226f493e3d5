"""Rotary embeddings that depend on a document's length: the same steps in every layout, as student and as teacher.

Documents have 4, 8 and 12 tokens, tables change at 8. What one process computes is held against stock transformers in
tests/unit/test_models_rotary.py.
"""

import pytest
import torch

from kdtrain.distributed.mesh import Mesh
from kdtrain.jobs.build import teacher as build
from kdtrain.models.load import load_backbone
from tests.support.layout_oracle import check_case, oracle
from tests.support.layout_steps import VOCAB, Case, model_spec, run_cases, teacher_settings
from tests.support.tiers import slow_cases

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

CASES = {
    2: [
        Case("longrope", 2, 1, (8, 1, 3)),
        Case("longrope", 1, 3, (4, 1, 3), recompute=True, teacher="plain zero3 limit24"),
        Case("dynamic", 2, 3, (3, 8, 1), sequence=True, recompute=True, teacher="tp"),
        Case("longrope", 2, 0, (8, 1, 3), sequence=True, teacher="plain limit12"),
        Case("dynamic", 1, 2, (1, 4, 3), teacher="tp2"),
        Case("dynamic", 1, 1, (8, 1, 3), cp=2, teacher="plain overlap"),
        Case("longrope", 1, 3, (3, 8, 1), cp=2, recompute=True, teacher="plain limit12"),
    ],
    4: [Case("longrope", 2, 1, (8, 1, 3), cp=2, teacher="tp"), Case("dynamic", 4, 2, (3, 1, 8), sequence=True)],
}


def teacher_kind(student):
    return "dynamic" if student == "longrope" else "longrope"


def whole_teacher(kind):
    def build_whole(folder):
        return load_backbone(model_spec(folder, kind, dtype="float32"), Mesh(), vocab_size=VOCAB, trainable=False)

    return build_whole


def build_teacher(folder, student, mesh, words):
    """As layout_steps' of the same name, of the kind that the student is not."""
    kind = teacher_kind(student.config.rope_parameters["rope_type"])
    cfg, spec = teacher_settings(mesh, words), model_spec(folder, kind, dtype="float32")
    return build.build_teacher(cfg, spec, student.shard, mesh, torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rotary")


@pytest.fixture(scope="module")
def oracles(folder):
    wanted = {case.what for cases in CASES.values() for case in cases}
    return {what: oracle(folder, *what, whole_teacher(teacher_kind(what[0]))) for what in wanted}


@pytest.mark.parametrize("world_size", slow_cases(CASES, 2))
def test_length_dependent_models_make_the_same_steps_in_every_layout(world_size, fresh_pool, folder, oracles):
    cases = CASES[world_size]
    answers = fresh_pool(world_size).run(run_cases, timeout_s=400, folder=folder, cases=cases, teacher_of=build_teacher)
    for rank in range(world_size):
        assert answers[rank] == answers[0], "ranks disagree about a loss or a norm"
    for case, answer in zip(cases, answers[0], strict=True):
        check_case(case, answer, oracles[case.what], folder / case.name)
