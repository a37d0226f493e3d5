"""The benchmark of the store of records: samplers are unbiased, the error is the definition, rows make the table."""

from importlib import import_module

import numpy as np
import pytest
import torch

from kdtrain.teacher.stored.codec import decode, encode
from kdtrain.teacher.stored.records import RecordFields


@pytest.fixture(scope="module")
def bench():
    return import_module("bench_logit_store")


def distribution(rows, vocab_size):
    rng = torch.Generator().manual_seed(0)
    return torch.log_softmax(3 * torch.randn(rows, vocab_size, generator=rng), -1)


def dense(rows, vocab_size, *, share):
    found = torch.zeros(len(rows), vocab_size, dtype=torch.float64)
    for row, (kept, weights, drawn, rest) in enumerate(rows):
        found[row, kept] = torch.from_numpy(weights)
        found[row].index_add_(0, torch.from_numpy(drawn), torch.full((len(drawn),), rest / share(drawn)).double())
    return found


@pytest.mark.parametrize("tau0", [1 / 4, 1 / 12])
def test_threshold_sampling_is_unbiased_and_as_wide_as_it_says(bench, tau0):
    log_p, rng = distribution(4, 60), np.random.default_rng(1)
    p, total = log_p.double().exp(), torch.zeros(4, 60, dtype=torch.float64)
    sampler = bench.Sorted(log_p)
    for _ in range(500):
        rows = sampler.threshold_rows(tau0, rng)
        for row, (kept, weights, drawn, rest) in enumerate(rows):
            above = int((p[row] >= tau0).sum())
            left = 1 - float(p[row][p[row] >= tau0].sum())
            assert len(kept) + len(drawn) == above + int(np.ceil(left / tau0 - 1e-9))
            assert len({*kept.tolist(), *drawn.tolist()}) == len(kept) + len(drawn)
            assert weights.sum() + rest == pytest.approx(1, abs=1e-9)
            assert rest / len(drawn) <= tau0 + 1e-9
        total += dense(rows, 60, share=len)
    torch.testing.assert_close(total / 500, p, rtol=0, atol=5 * tau0 / 2 / 500**0.5)


def test_random_sampling_is_unbiased(bench):
    log_p, rng = distribution(4, 60), torch.Generator().manual_seed(1)
    total = sum(dense(bench.random_rows(log_p, rng), 60, share=len) for _ in range(500)) / 500
    torch.testing.assert_close(total, log_p.double().exp(), rtol=0, atol=5 * 0.5 / (24 * 500) ** 0.5)


@pytest.mark.parametrize("kind", ["threshold", "random"])
def test_error_is_the_squared_distance_of_the_target(bench, kind):
    log_p, rng = distribution(50, 300), torch.Generator().manual_seed(2)
    if kind == "threshold":
        rows, fields = (
            bench.Sorted(log_p).threshold_rows(1 / 8, np.random.default_rng(3)),
            RecordFields(300, draws="equal"),
        )
    else:
        rows, fields = bench.random_rows(log_p, rng), RecordFields(300, draws="counts", samples=bench.DRAWS)
    records = bench.records_of(rows, fields, log_p, torch.arange(50))
    wanted = (dense(rows, 300, share=len) - log_p.double().exp()).square().sum(1).mean()
    assert bench.squared_error(records, fields, log_p) == pytest.approx(float(wanted), rel=1e-4)
    np.testing.assert_allclose(records.label_log_prob, log_p.diagonal())


def test_times_and_rows_of_the_store_make_the_table_and_the_goals(bench, tmp_path):
    log_p = distribution(64, 300)
    fields = RecordFields(300, draws="equal")
    made = [
        bench.records_of(
            bench.Sorted(log_p).threshold_rows(1 / 8, np.random.default_rng(3)), fields, log_p, torch.arange(64)
        )
        for _ in range(9)
    ]
    records = [decode(encode(one, fields), fields) for one in made]
    times, size = bench.store_times(fields, records, tmp_path / "store")
    assert {mode: len(seconds) for mode, seconds in times.items()} == {"write": 2, "read": 200, "target": 200}
    parts = dict(part.rsplit(" ", 1) for part in bench.field_bytes(fields, records).split(", "))
    assert float(parts["label"]) == float(parts["entropy"]) == 2.0
    assert 9 * 64 * sum(map(float, parts.values())) < size
    base = dict.fromkeys(bench.COLUMNS, "") | {"median_ms": "0.5", "ids_per_token": "9.00", "bytes_per_token": "30.00"}
    rows = []
    for target, error in ((bench.HEADLINE, "0.0100"), (bench.RANDOM, "0.0400")):
        for mode in ("write", "read", "target"):
            row = {"shape": f"{target}, S=64 V=300", "provider": "LogitStore", "mode": mode, "target_error": error}
            rows.append(base | row | {"fields": "label 2.00"})
    for provider, median in (("parquet + zstd", "10"), ("parquet + zstd, the same, tuned", "0.25")):
        row = {"shape": f"{bench.HEADLINE}, S=64 V=300", "provider": provider, "mode": "read", "median_ms": median}
        rows.append(base | row)
    goals = {goal["name"]: goal["measured"] for goal in bench.goals_of(rows)}
    assert goals == {
        "logit_store_bytes_per_token": "30.00",
        "logit_store_error_of_random_sampling": "0.250",
        "logit_store_read_ms_1024": "0.5",
        "logit_store_read_speedup_over_parquet_defaults": "20",
        "logit_store_read_speedup_over_parquet_tuned": "0.5",
    }
    assert f"| {bench.HEADLINE} | parquet + zstd | 30.00 | 9.00 |  |  | 10 |  |" in bench.table_of(rows)


def test_byte_planes_of_the_peers_hold_what_they_are_given():
    peers = import_module("logit_store_peers")
    source = np.random.default_rng(0)
    types = {
        "kept": "u1",
        "drawn": "u1",
        "ids": "<u2",
        "weights": "<f2",
        "rest": "<f2",
        "label": "<f2",
        "entropy": "<f2",
    }
    given = {name: source.integers(0, 99, 40).astype(dtype) for name, dtype in types.items()}
    planes = peers.Planes(lambda data: data[::-1], lambda data: data[::-1])
    found = planes.decode(planes.encode(given), {name: array.dtype for name, array in given.items()})
    for name, array in given.items():
        np.testing.assert_array_equal(found[name], array)
