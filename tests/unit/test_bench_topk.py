"""The top-k benchmark: its table is made from its CSV, its check detects wrong results, its measurement runs."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize("provider", ["streamed-128MiB", "naive", "chunked"])
def test_every_provider_matches_the_float64_list_and_log_sum_exp(provider):
    bench = import_module("bench_topk")
    hidden, head = bench.inputs({"tokens": 40, "vocab": 700})
    errors = bench.errors_of(hidden, head, 16, bench.answer_of(provider, hidden, head, 16), chunk=16)
    assert errors["error"] <= 1e-5
    assert errors["tail_error"] <= 1e-3


def test_check_detects_a_wrong_id_order_and_tail():
    bench = import_module("bench_topk")
    hidden, head = bench.inputs({"tokens": 40, "vocab": 700})
    ids, values, lse, tail = bench.naive(hidden, head, 16)
    other = ids.clone()
    other[33, 2] = (hidden[33] @ head.T).argmin()
    assert bench.errors_of(hidden, head, 16, (other, values, lse, tail), chunk=16)["error"] > 1
    assert bench.errors_of(hidden, head, 16, (ids, values.flip(1), lse, tail), chunk=16)["error"] > 1e-2
    assert bench.errors_of(hidden, head, 16, (ids, values, lse, tail - 1), chunk=16)["tail_error"] > 0.9


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_measurement_times_the_list_and_records_its_memory(monkeypatch):
    bench, common = import_module("bench_topk"), import_module("measuring")
    monkeypatch.setattr(common, "RUN_SECONDS", 0.0)
    job = {"tokens": 512, "vocab": 16384, "k": 8, "provider": "naive"}
    answer = bench.measure(job)
    assert len(answer["times"]) == common.MIN_RUNS
    logits = 4 * 512 * 16384
    assert logits / 2 <= answer["peak_bytes"] <= 8 * logits
    row = bench.row_of(job, answer, "c")
    assert set(row) < set(bench.COLUMNS)
    assert torch.get_num_threads() == answer["threads"]
