"""One table says what an objective is and needs: every name has its traits, its class and its section."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from kdtrain.config.objectives import OBJECTIVES, traits_of, without_teacher
from kdtrain.config.schema import ObjectiveSection, ObjectiveSettings, RunConfig
from kdtrain.distributed.vocab import VocabShard
from kdtrain.errors import ConfigError
from kdtrain.jobs.build.models import Models
from kdtrain.jobs.build.objective import build_objective, objective_class
from kdtrain.losses.matrix import TARGETS
from kdtrain.objectives.base import ObjectiveClass
from kdtrain.planning.describe import loss_line
from kdtrain.run_state.heartbeat import PhaseTracker
from kdtrain.teacher.signal import HeadLayout
from kdtrain.training.timing import PhaseTimer

ROOT = Path(__file__).resolve().parents[2]


NAMES = get_args(get_type_hints(ObjectiveSection)["name"])
LAYOUT = HeadLayout(VocabShard.of(8), None, 1 << 16)


def test_every_objective_has_traits_and_a_section():
    assert set(NAMES) == set(OBJECTIVES) == {field.name for field in fields(ObjectiveSection)} - {"name", "z_loss"}
    assert all(isinstance(getattr(ObjectiveSection(), name), ObjectiveSettings) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_class_is_constructed_and_called_alike(name):
    found = objective_class(OBJECTIVES[name])
    want = [*inspect.signature(ObjectiveClass.__call__).parameters][1:]
    assert [*inspect.signature(found).parameters] == want
    assert [*inspect.signature(found.__call__).parameters][1:] == ["batch", "measure"]


class Source:
    """A source of signals that no loss is computed with."""

    def __init__(self, kind):
        self.kind, self.calls = kind, []

    def prefetch(self, micro_batches):
        self.calls.append(("prefetch", micro_batches))


def build(name, source):
    cfg = RunConfig()
    cfg.objective.name = name
    timer = PhaseTimer(torch.device("cpu"), PhaseTracker(0))
    return build_objective(cfg, None, Models(None, source, LAYOUT, None), timer)


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_is_built_with_the_source_only_if_its_traits_name_the_kind(name):
    signals = OBJECTIVES[name].signals
    for kind in TARGETS:
        source = Source(kind)
        if signals and kind not in signals:
            with pytest.raises(ConfigError, match=f"objective.name = {name} cannot use {kind} signals"):
                build(name, source)
            continue
        build(name, source).prefetch([1])
        assert source.calls == ([("prefetch", [1])] if signals else [])
    if signals:
        with pytest.raises(ConfigError, match=f"objective.name = {name} needs a teacher"):
            build(name, None)


def test_the_line_of_the_console_is_that_of_the_chosen_section():
    assert loss_line(ObjectiveSection(name="pretrain")) == "cross-entropy"
    objective = ObjectiveSection(name="distill", z_loss=1e-4)
    assert loss_line(objective) == "forward_kl, temperature 1, weight 0.5; ce weight 0.5; z-loss 0.0001"


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
