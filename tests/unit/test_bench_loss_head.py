"""The loss-head benchmark: its table is made from its CSV, its providers agree with float64, its measurement runs."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "bench_loss_head.py"


def one(job):
    command = [sys.executable, str(SCRIPT), "--one", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_published_streamed_loss_uses_a_tenth_of_the_naive_memory_and_no_more_time():
    bench, common = import_module("bench_loss_head"), import_module("measuring")
    [row] = [
        row
        for row in common.read_csv(bench.RESULTS, "")
        if row["shape"].startswith("T=4096 ") and (row["provider"], row["mode"]) == (bench.MAIN, "train")
    ]
    assert float(row["peak_ratio"]) <= 0.1
    assert float(row["time_ratio"]) <= 1.0


@pytest.mark.parametrize("task", ["kl_ce", "kl", "jsd", "ce"])
def test_every_available_provider_matches_float64(task):
    bench, providers = import_module("bench_loss_head"), import_module("loss_providers")
    arguments = bench.inputs(40, 300, True)
    expected = providers.float64_answer(task, arguments, chunk=16)
    compared = []
    for provider in providers.providers(task):
        if provider.is_compiled or provider.absent("cpu"):
            continue
        loss, gradients = bench.run(provider.loss, arguments, True)
        errors = providers.errors_of(provider, loss, gradients, expected)
        assert max(errors.values()) <= 1e-5, (provider.name, errors)
        compared.append(provider.name)
    assert {"streamed-128MiB", "naive", "chunked"} <= set(compared)


@pytest.mark.slow
def test_fused_cross_entropy_of_torch_is_accurate_in_float32_and_not_in_bfloat16():
    providers = import_module("loss_providers")
    provider = providers.find("ce", "torch-linear-ce")
    normal = [torch.randn(size, 64, generator=torch.Generator().manual_seed(size)) for size in (4096, 8192)]
    labels = torch.randint(8192, (4096,), generator=torch.Generator().manual_seed(1))
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        hidden, head = (x.mul(0.4).to(dtype).requires_grad_() for x in normal)
        arguments = (hidden, head, hidden.detach(), head.detach(), labels)
        loss = provider.loss(*arguments)
        gradients = list(torch.autograd.grad(loss, arguments[:2]))
        errors[dtype] = providers.errors_of(provider, loss, gradients, providers.float64_answer("ce", arguments, 1024))
    assert max(errors[torch.float32].values()) < 1e-5
    assert errors[torch.bfloat16]["value_error"] > 0.01, "torch has mended it: take the note off its row"
    assert errors[torch.bfloat16]["gradient_error"] > 0.01
    assert "no oracle in bfloat16" in provider.note


def test_float64_result_does_not_depend_on_chunks():
    bench, providers = import_module("bench_loss_head"), import_module("loss_providers")
    arguments = bench.inputs(10, 50, True)
    for a, b in zip(
        providers.float64_answer("kl_ce", arguments, 3), providers.float64_answer("kl_ce", arguments), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_missing_package_and_missing_device_are_named():
    providers = import_module("loss_providers")
    missing = providers.Provider("a", "kl", None, needs=("no_such_package_of_mine",))
    assert missing.absent("cpu") == "ModuleNotFoundError: No module named 'no_such_package_of_mine'"
    assert providers.find("ce", "cut-ce").absent("cpu") == "needs cuda"
    with pytest.raises(KeyError, match="no provider 'x' of ce; there are streamed-128MiB, "):
        providers.find("ce", "x")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_measurement_checks_and_times_the_loss_and_records_its_memory(tmp_path):
    bench, common = import_module("bench_loss_head"), import_module("measuring")
    job = {"tokens": 64, "vocab": 4096, "provider": bench.MAIN, "mode": "train", "task": "kl_ce"}
    assert bench.measure({**job, "save": str(tmp_path / "expected.pt")}) == {}
    answer = one({**job, "expected": str(tmp_path / "expected.pt")})
    assert len(answer["times"]) >= common.MIN_RUNS
    assert all(seconds > 0 for seconds in answer["times"])
    assert 0 < answer["gradient_error"] <= 1e-5
    head_gradient = 4 * 4096 * bench.WIDTH_S
    assert head_gradient / 2 <= answer["peak_bytes"] <= 64 * head_gradient


def test_wrong_result_is_not_timed(tmp_path):
    bench = import_module("bench_loss_head")
    job = {"tokens": 8, "vocab": 64, "provider": "naive", "mode": "train", "task": "kl"}
    bench.measure({**job, "task": "ce", "save": str(tmp_path / "expected.pt")})
    answer = bench.measure({**job, "expected": str(tmp_path / "expected.pt")})
    assert answer["absent"].startswith("wrong: value error ")
    assert "times" not in answer


def test_ratios_refer_to_the_naive_row_of_the_same_task_shape_and_mode():
    common = import_module("measuring")
    row = {"task": "kl", "shape": "s", "mode": "train", "absent": ""}
    rows = [
        {**row, "provider": "naive", "median_ms": "10", "peak_bytes": 200},
        {**row, "provider": "a", "median_ms": "5", "peak_bytes": 20},
        {**row, "provider": "a", "median_ms": "5", "peak_bytes": 20, "mode": "eval"},
        {**row, "provider": "b", "absent": "needs cuda"},
    ]
    found = [(r.get("time_ratio"), r.get("peak_ratio")) for r in common.with_ratios(rows)]
    assert found == [("1.000", "1.000"), ("0.500", "0.100"), (None, None), (None, None)]


def test_rows_and_goal_of_two_checkouts_have_the_largest_ratio():
    pair = import_module("loss_pair")
    same = {"commit": {"this": "abc", "base": "def"}, "date": "2026-11-30"}
    rows = []
    for shape, this in ((("kl_ce", 256, 8192), 0.5), (("ce", 512, 50257), 1.5), (("jsd", 512, 50257), 1.0)):
        rows += pair.rows_of(shape, {"this": [this, 9.0, this], "base": [2.0, 2.0, 0.1]}, same)
    assert [(row["commit"], row["provider"], row["time_ratio"]) for row in rows[:2]] == [
        ("abc", "this", "0.250"),
        ("def", "base", ""),
    ]
    assert (rows[2]["task"], rows[2]["shape"], rows[2]["median_ms"]) == ("ce", "T=512 V=50257", "1500")
    goal = pair.goal_of(rows)
    assert (goal["measured"], goal["goal"], goal["commit"]) == ("0.750", "0.9", "abc")


@pytest.mark.slow
def test_two_checkouts_take_turns():
    pair = import_module("loss_pair")
    times = pair.paired_times({"this": pair.ROOT, "base": pair.ROOT}, ("kl_ce", 8, 64), runs=2)
    assert [len(seconds) for seconds in times.values()] == [2, 2]
    assert all(second > 0 for seconds in times.values() for second in seconds)


def test_a_checkout_without_the_loss_is_refused(tmp_path):
    pair = import_module("loss_pair")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/bench_loss_head.py").write_text("raise RuntimeError")
    with pytest.raises(SystemExit, match="ended with 1"):
        pair.paired_times({"this": pair.ROOT, "base": tmp_path}, ("kl_ce", 8, 64), runs=1)
