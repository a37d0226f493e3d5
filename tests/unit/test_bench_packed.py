"""The benchmark of packed attention: its check detects leaks, its measurement runs, the goals are the ratios."""

import sys
from importlib import import_module

import pytest
import torch


@pytest.fixture(scope="module")
def bench():
    return import_module("bench_packed")


def error_of(bench, forward, seq_len=700):
    positions, layers, grad = bench.inputs(seq_len)
    outputs = forward(positions, layers)
    torch.autograd.backward(outputs, [grad] * len(outputs))
    return bench.error_of(outputs, layers, grad, bench.document_lengths(seq_len))


@pytest.mark.parametrize("provider", ["naive", "packed"])
def test_every_provider_matches_attention_in_float64(bench, provider):
    lengths = bench.document_lengths(1700)
    assert len(lengths) > 2
    assert sum(lengths) == 1700
    assert error_of(bench, getattr(bench, provider)) <= 1e-5


def test_check_detects_joined_documents_and_wrong_gradients(bench):
    assert error_of(bench, lambda positions, layers: bench.packed(torch.arange(700)[None], layers)) > 0.05

    def halved(positions, layers):
        return [x / 2 + x.detach() / 2 for x in bench.packed(positions, layers)]

    assert error_of(bench, halved) > 0.4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_measurement_includes_the_masks_and_makes_a_row(bench, monkeypatch):
    common = import_module("measuring")
    monkeypatch.setattr(common, "RUN_SECONDS", 0.0)
    rows = []
    for provider in bench.PROVIDERS:
        job = {"seq_len": 1536, "provider": provider}
        answer = bench.measure(job)
        assert len(answer["times"]) == common.MIN_RUNS
        rows.append(bench.row_of(job, answer, "c", 0.25))
        assert set(rows[-1]) < set(bench.COLUMNS)
    masks = bench.LAYERS * 4 * 1536**2
    assert masks / 2 <= rows[0]["peak_bytes"] <= 4 * masks
    assert 0 <= rows[1]["peak_bytes"] <= masks
    rows = common.with_ratios(rows)
    assert "S=1536" in bench.table_of(rows)
    goals = {goal["name"]: goal["measured"] for goal in bench.goals_of(rows)}
    assert goals["packed_attention_peak_ratio_8192"] == rows[1]["peak_ratio"]
    assert goals["packed_attention_time_ratio_1024"] == rows[1]["time_ratio"]
