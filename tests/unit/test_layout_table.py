"""The table of layouts: complete, all right as published, and made by a verdict that sees what is wrong."""

import math
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.support import layout_oracle

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def layouts():
    return import_module("layouts")


def test_every_stage_meets_every_place_a_teacher_may_have(layouts):
    cases = layouts.cases()
    names = [(world, case.name) for world, some in cases.items() for case in some]
    assert len(set(names)) == len(names) >= 80
    for world, tp in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)):
        here = [case for case in cases[world] if case.tp == tp]
        assert {case.stage for case in here if case.teacher is None} == {0, 1, 2, 3}
        assert {case.teacher for case in here} == {None, *layouts.teachers(world, tp)}
        assert {case.family for case in here} == set(layouts.FAMILIES)
        divided = {case.family for case in here if case.sequence}
        assert divided == (set(layouts.FAMILIES) if tp > 1 else set())
        assert {case.dtype for case in here} == {"float32", "bfloat16"}
    shared = {(world, case.tp, case.cp) for world, some in cases.items() for case in some if case.cp > 1}
    assert shared == {(2, 1, 2), (4, 1, 2), (4, 2, 2), (4, 1, 4)}
    assert layouts.teachers(4, 2)[6:] == ["tp4", "tp4 zero3", "tp4 zero3 offload"]


def test_the_published_table_has_a_line_per_layout_and_every_one_is_right(layouts):
    lines = [line for line in layouts.TABLE.read_text(encoding="utf-8").splitlines() if line.endswith("right |")]
    assert len(lines) == sum(len(some) for some in layouts.cases().values())


def test_a_layout_that_is_wrong_or_fails_is_shown_as_such(layouts):
    case = layouts.Case("llama", 2, 1, (8, 8, 8))
    names = layouts.ERRORS
    errors, limits = dict.fromkeys(names, 1e-6), layouts.LIMITS["float32"]
    assert layouts.Row(2, case, 1.0, 1.0, errors, limits).verdict == "right"
    for name in names:
        assert layouts.Row(2, case, 1.0, 1.0, {**errors, name: 2e-5}, limits).verdict == f"WRONG: {name}"
        assert layouts.Row(2, case, 1.0, 1.0, {**errors, name: float("nan")}, limits).verdict == f"WRONG: {name}"
    failed = layouts.row_of(2, case, None, "FAILED: rank 1", None, Path())
    assert layouts.line_of(failed).endswith("| nan | nan |  |  |  |  |  | FAILED: rank 1 |")


def test_the_worst_error_is_nan_if_one_is_nan():
    for found in ([1.0, float("nan"), 2.0], [float("nan"), 1.0], [1.0, float("nan")]):
        error, where = layout_oracle.worst([(f"number {value}", value) for value in found])
        assert math.isnan(error)
        assert where == "number nan"


def test_a_gpu_per_rank_is_demanded_before_anything_runs(layouts, monkeypatch):
    import torch

    for there, fix in ((0, "use a machine with GPUs, or --device cpu"), (2, "--ranks 1 2")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        monkeypatch.setattr(sys, "argv", ["layouts.py", "--device", "cuda"])
        with pytest.raises(SystemExit) as refused:
            layouts.main()
        first, why, last = str(refused.value).splitlines()
        assert first == f"--device cuda: layouts of 4 ranks, but this machine has {there} CUDA devices"
        assert "NCCL refuses two ranks on a device" in why
        assert last == f"  fix: {fix}"
    layouts.refuse_too_few_devices({1: layouts.cases()[1], 2: layouts.cases()[2], 4: []}, "cuda")
    layouts.refuse_too_few_devices(layouts.cases(), "cpu")


def test_ranks_with_gpus_are_never_forked(layouts):
    with pytest.raises(ValueError, match="needs fresh = True"):
        layouts.RankPool(2, backend="nccl")
