"""One table says what an objective needs: every name has its traits, its section and what builds it."""

from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

from kdtrain.config.objectives import OBJECTIVES, traits_of, without_teacher
from kdtrain.config.schema import ObjectiveSection
from kdtrain.jobs.build.objective import BUILDERS
from kdtrain.losses.matrix import TARGETS

ROOT = Path(__file__).resolve().parents[2]


def test_every_objective_has_traits_a_section_and_a_builder():
    names = set(get_args(get_type_hints(ObjectiveSection)["name"]))
    assert names == set(OBJECTIVES) == set(BUILDERS)
    assert names <= {field.name for field in fields(ObjectiveSection)}


def test_signals_are_rows_of_the_loss_matrix():
    assert {signal for traits in OBJECTIVES.values() for signal in traits.signals} <= set(TARGETS)
    assert traits_of(ObjectiveSection(name="distill")).needs_teacher
    assert not traits_of(ObjectiveSection(name="pretrain")).needs_teacher
    assert without_teacher() == "objective.name=pretrain"


def test_no_code_compares_the_name_of_an_objective():
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("kdtrain", "launch")
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "objective.name ==" in line or "objective.name !=" in line
    ]
    assert not found, "read its traits instead: kdtrain/config/objectives.py"
