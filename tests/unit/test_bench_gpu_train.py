"""The GPU suite's training runs: their settings, their verdicts, and the message where they cannot run."""

import csv
import json
import os
import re
import sys
import time
from importlib import import_module, metadata
from pathlib import Path

import pytest
import torch

from kdtrain.config.cli import parse

RECORD = {"loss/total": 4.0, "loss/kd": 2.0, "loss/ce": 5.0, "optim/grad_norm": 1.0}


@pytest.fixture(scope="module")
def train():
    return import_module("gpu_train")


@pytest.fixture(scope="module")
def models(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    train.write_models(folder, {run.models for run in train.RUNS})
    return folder


@pytest.fixture
def setting(tmp_path):
    return import_module("gpu_common").Setting(torch.device("cpu"), tmp_path, True, False)


@pytest.fixture
def bench(train, models):
    return train.Bench(models, True, time.monotonic() + 100)


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_run_has_a_valid_configuration(train, models, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # parse sets what a launcher would set
    found = {}
    for run in (*train.RUNS, *train.REFERENCES.values()):
        words = [str(models / run.models / "config.yaml"), f"run.name={run.name}", "schedule.shape=constant"]
        found[run.name] = parse([*words, *run.settings], None).config
    configs = [found[run.name] for run in train.RUNS]
    assert {(cfg.zero.stage, cfg.student.dtype) for cfg in configs} == {
        *((stage, "float32") for stage in (0, 1, 2, 3)),
        *((stage, "bfloat16") for stage in (1, 2, 3)),
    }
    assert {cfg.zero.stage for cfg in configs if cfg.zero.offload_optimizer} == {2, 3}
    assert any(cfg.teacher.zero_stage == 3 and cfg.teacher.offload for cfg in configs)
    assert any(cfg.teacher.overlap and cfg.checkpoint.async_write for cfg in configs)
    for run in train.RUNS:
        reference = train.REFERENCES[run.reference]
        assert reference.models == run.models
        assert run.tolerance == (5e-2 if found[run.name].student.dtype == "bfloat16" else 1e-4)
    assert [run.name for run in train.RUNS if run.resumed] == ["resumed"]


def test_two_models_have_tensors_of_two_dtypes(train, models):
    from kdtrain.models.load import ModelSpec, model_info

    student = ModelSpec(architecture=str(models / "recurrent_student/student.json"))
    teacher = ModelSpec(weights=str(models / "recurrent_teacher/teacher"))
    for spec in (student, teacher):
        assert model_info(spec, 101, trainable=False).float32 == ("model.layers.0.linear_attn.A_log",)


def test_worst_difference_covers_all_steps_and_is_nan_if_any_value_is(train):
    off = {**RECORD, "optim/grad_norm": 1.01}
    assert train.worst_difference([RECORD, off], [RECORD, RECORD]) == pytest.approx(0.01)
    for got, want in (([RECORD], [RECORD] * 2), ([], []), ([{**RECORD, "loss/kd": float("nan")}], [RECORD])):
        assert not train.worst_difference(got, want) <= 1.0


def write_metrics(models, run, name, change, steps=6):
    path = models / run.models / "runs" / name / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**RECORD, "loss/total": 4.0 * (1 + change), "memory/peak_allocated_gib": 0.5}
    path.write_text("\n".join(json.dumps(record) for _ in range(steps)), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "steps", "verdict"), [(0.0, 6, "ok"), (9e-5, 6, "ok"), (1.1e-4, 6, "FAIL"), (0.0, 5, "FAIL")]
)
def test_run_is_right_within_its_tolerance_and_with_all_steps(train, bench, setting, change, steps, verdict):
    run = train.RUNS[2]
    write_metrics(bench.folder, run, f"reference_{run.reference}", 0.0, steps)
    write_metrics(bench.folder, run, run.name, change, steps)
    row = train.row_of(setting, bench, run, train.Outcome(9.0), train.Outcome(8.0))
    assert (row["verdict"], row["steps"], row["peak_bytes"], row["seconds"]) == (verdict, steps, 2**29, "9.0")
    assert row["estimate_bytes"] > 0


def test_verdict_does_not_need_a_memory_estimate(train, bench, setting, monkeypatch):
    def estimated_bytes(bench, run):
        raise TypeError("estimate() missing 2 arguments")

    monkeypatch.setattr(train, "estimated_bytes", estimated_bytes)
    run, well = train.RUNS[2], train.Outcome(8.0)
    for name in (run.name, f"reference_{run.reference}"):
        write_metrics(bench.folder, run, name, 0.0)
    row = train.row_of(setting, bench, run, well, well)
    assert (row["verdict"], row["worst"], row["estimate_bytes"]) == ("ok", "0", "")
    assert row["note"] == "no estimate: TypeError: estimate() missing 2 arguments"


def test_failed_run_leaves_its_reason_and_output(train, bench, setting):
    run, well = train.RUNS[0], train.Outcome(8.0)
    wrong = train.Outcome(9.0, "ended with 1", "a\nCUDA error")
    for outcome, reference, who in ((wrong, well, "zero0"), (well, wrong, "reference llama")):
        row = train.row_of(setting, bench, run, outcome, reference)
        assert (row["verdict"], row["note"]) == ("FAIL", f"{who} ended with 1")
    assert (setting.out / "dry_train.log").read_text(encoding="utf-8").count("CUDA error") == 2


def test_run_beyond_the_budget_is_not_started(train, models, setting):
    late = train.Bench(models, True, time.monotonic() + 1)
    found = list(train.rows(setting, late, [train.RUNS[0]], 1))
    assert [(row["verdict"], row["note"]) for row in found] == [
        ("FAIL", "zero0 not started: the time budget is spent"),
    ]


def test_hanging_run_is_stopped(train, bench):
    outcome = bench._launch_once(["run.name=slow"], "llama", 0.5, True)
    assert outcome.problem == "did not end within 0 s"


def test_without_deepspeed_every_run_is_absent_and_the_wheels_are_named(train, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "missing", lambda: ["deepspeed", "pydantic-core"])
    monkeypatch.setattr(sys, "argv", ["gpu_train.py", "--cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        train.main()
    message = str(ended.value.code)
    assert message.startswith("not installed: deepspeed pydantic-core\n")
    assert "pip download" in message
    assert re.search(r"pydantic-core==\d", message)
    assert re.search(r"pip wheel .* deepspeed==\d", message)
    assert "pip install --no-index" in message
    rows = rows_of(tmp_path / "dry_train.csv")
    assert [row["name"] for row in rows] == [run.name for run in train.RUNS]
    assert {row["verdict"] for row in rows} == {"absent"}


def needs(names):
    """Names of distributions, and of all that they need."""
    found, left = set(), [re.sub("[-_.]+", "-", name).lower() for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        lines = [line for line in metadata.requires(name) or () if "extra ==" not in line]
        left += [re.sub("[-_.]+", "-", re.match(r"[\w.-]+", line).group()).lower() for line in lines]
        found -= {other for other in found if not list(metadata.distributions(name=other))}
        left = [other for other in left if list(metadata.distributions(name=other))]
    return found


def test_wheels_cover_the_imports_of_a_run_beyond_torch_and_transformers(train):
    listed = {name.lower() for name in train.NEEDED}
    whole = needs(("deepspeed", "omegaconf", "rich"))
    assert whole - needs(("torch", "transformers", "safetensors", "tokenizers")) <= listed <= whole


def test_unknown_run_is_refused(train, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_train.py", "zero4", "--cpu"])
    with pytest.raises(SystemExit):
        train.main()
    assert "no run zero4; see --list" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu_train.py", "--list"])
    train.main()
    assert len(capsys.readouterr().out.splitlines()) == len(train.RUNS)


def test_suite_uses_the_budget_of_its_table():
    text = (Path(__file__).resolve().parents[2] / "benchmarks/gpu_suite.sh").read_text(encoding="utf-8")
    limits = {name: int(seconds) for name, seconds in re.findall(r"^    (\w+)\) \w+ (\d+) ", text, re.MULTILINE)}
    for group in ("gpu-1", "gpu-2", "gpu-3"):
        (line,) = re.findall(rf"^#   {group} .*$", text, re.MULTILINE)
        named = {name: int(seconds) for name, seconds in re.findall(r"(\w+) (\d+)", line)}
        assert named.items() <= limits.items()
        assert sum(named.values()) == int(line.split()[-1]) <= 590
        (stages,) = re.findall(rf'^{group.replace("-", "_")}="(.*)"', text, re.MULTILINE)
        assert stages.split() == list(named)
        assert limits["train"] > import_module("gpu_train").BUDGET + 30
