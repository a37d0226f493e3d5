"""Checks of a configuration's values: one case per message, and what passes."""

import importlib
from pathlib import Path

import pytest

from kdtrain.config import checks
from kdtrain.config.checks import value_problems
from kdtrain.config.load import Loaded
from kdtrain.config.problems import format_problems
from kdtrain.errors import EXIT_CONFIG, ConfigError
from tests.support import config_cases_layout, config_cases_models, config_cases_training
from tests.support.config_cases import ProblemLines, dedicated, distill, runnable

CASES = {**config_cases_models.CASES, **config_cases_layout.CASES, **config_cases_training.CASES}
"""Module of kdtrain.config.checks -> its cases."""
TESTED_ELSEWHERE = {"report", "paths"}
"""Modules without values to check: the report's methods and tests/unit/test_config_paths.py."""


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, cases in CASES.items() for name in cases])
def test_each_mistake_is_one_problem_with_reason_and_fix(module, name, monkeypatch):
    changes, key, words = CASES[module][name]
    lines = ProblemLines(monkeypatch)
    found = value_problems(runnable(**changes), world_size=4)
    assert [problem.key for problem in found] == [key]
    assert lines.modules() == {module}
    text = format_problems(found, {key: "x.yaml:7"})
    assert text.startswith(f"1 problem in this run's configuration\n\n  {key} = ")
    assert "    [x.yaml:7]\n      " in text
    assert words in text
    assert found[0].fix


def test_every_module_of_checks_has_cases():
    modules = {path.stem for path in Path(checks.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(CASES) == modules - TESTED_ELSEWHERE


@pytest.mark.parametrize("module", CASES)
def test_every_message_is_produced_by_a_case(module, monkeypatch):
    lines = ProblemLines(monkeypatch)
    for changes, _, _ in CASES[module].values():
        value_problems(runnable(**changes), world_size=4)
    assert lines.not_reached(importlib.import_module(f"kdtrain.config.checks.{module}")) == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel__tp": 4, "data__tokens_per_step": 24},
        {"parallel__cp": 2, "data__tokens_per_step": 24},
        {"parallel__tp": 1, "parallel__cp": 2, "data__tokens_per_step": 48},
        {"parallel__cp": 2, "teacher__layout": "tp"},
        {"parallel__cp": 2, "teacher__layout": "tp", "teacher__tp": 2},
        {"objective__name": "pretrain", "teacher__weights": None},
        {
            "objective__name": "pretrain",
            "teacher__weights": None,
            "teacher__attention": "flash_attention_2",
            "teacher__dtype": "float32",
        },
        {"student__weights": "w", "student__architecture": None},
        {"zero__stage": 0, "student__dtype": "float32"},
        {"teacher__layout": "tp", "teacher__tp": 4, "teacher__zero_stage": 3, "teacher__offload": True},
        dedicated(2, tp=2, in_flight=1, max_tokens_per_forward=8),
        {**dedicated(3), "parallel__tp": 1},
        {"teacher__overlap": True, "teacher__max_tokens_per_forward": 8, "zero__offload_optimizer": True},
        {"run__seed": 2**64 - 1},
        {"zero__extra": {"reduce_bucket_size": 5e8, "sub_group_size": 7, "reduce_scatter": False}},
        {"data__train_weights": [1e-9, 5.0], "data__validation": "v", "eval__every_steps": 1, "eval__max_tokens": 1},
        {"schedule__shape": "wsd", "schedule__decay_tokens": 960},
        {"schedule__shape": "constant", "schedule__warmup_tokens": 960},
        {"train__total_tokens": 97, "optim__grad_clip": None, "optim__betas": (0.0, 0.0), "optim__weight_decay": 0.0},
        {"guard__spike_sigmas": None, "guard__stall_warn_s": None, "guard__data_wait_share": 1.0},
        {"guard__max_skipped_steps": 3, "guard__stall_exit_s": 300.0},
        distill(kd_weight=0.0),
        distill(kd_weight=1.0, divergence="jsd", teacher_share=0.9),
        distill(divergence="alpha_beta", ab_alpha=-0.5, ab_beta=1.5),
    ],
)
def test_valid_configuration_has_no_problem(changes):
    assert value_problems(runnable(**changes), world_size=4) == []


def test_all_problems_are_reported_at_once_in_schema_order():
    cfg = runnable(optim__lr=-1.0, run__seed=-1, parallel__tp=3, teacher__weights=None, log__every_steps=0)
    keys = [problem.key for problem in value_problems(cfg, world_size=4)]
    assert keys == ["run.seed", "teacher.weights", "parallel.tp", "optim.lr", "log.every_steps"]


def test_check_raises_one_error_with_values_and_paths_and_exit_code_2(tmp_path):
    cfg = runnable(optim__lr=-1.0, run__output_dir=str(tmp_path), data__train=["nowhere"])
    with pytest.raises(ConfigError) as caught:
        checks.check(Loaded(cfg, {"optim.lr": "command line"}), world_size=4)
    assert caught.value.exit_code == EXIT_CONFIG == 2
    text = str(caught.value)
    assert text.startswith("3 problems in this run's configuration\n\n  optim.lr = -1.0    [command line]\n")
    assert "data.train = nowhere    [default]" in text
    assert "teacher.weights = t    [default]" in text
