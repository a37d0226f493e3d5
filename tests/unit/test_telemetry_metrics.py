import math

import pytest
import torch

from kdtrain.objectives.base import PER_TOKEN_METRICS
from kdtrain.telemetry.console import EVAL_COLUMNS, STEP_COLUMNS
from kdtrain.telemetry.memory import memory_record, peak_host_bytes
from kdtrain.telemetry.metrics import UNITS, Metrics

CPU = torch.device("cpu")


def test_mean_weights_tokens_not_batches():
    metrics = Metrics(device=CPU)
    metrics.add("loss/ce", torch.tensor(30.0), torch.tensor(10))
    metrics.add("loss/ce", torch.tensor(7.0), 1)
    assert metrics.reduce() == {"loss/ce": pytest.approx(37 / 11)}


def test_reduce_resets_the_sums():
    metrics = Metrics(device=CPU)
    metrics.add("loss/ce", 1.0, 1)
    metrics.reduce()
    assert metrics.reduce() == {}
    metrics.add("loss/ce", 5.0, 1)
    assert metrics.reduce() == {"loss/ce": 5.0}


def test_mean_without_tokens_is_nan():
    metrics = Metrics(device=CPU)
    metrics.add("loss/ce", 0.0, 0)
    assert math.isnan(metrics.reduce()["loss/ce"])


def test_sums_are_kept_in_float64():
    metrics = Metrics(device=CPU)
    metrics.add("loss/ce", torch.tensor(2.0**30, dtype=torch.float32), 1)
    for _ in range(100):
        metrics.add("loss/ce", torch.tensor(1e-3, dtype=torch.float32), 0)
    assert metrics.reduce()["loss/ce"] - 2.0**30 == pytest.approx(0.1, rel=1e-4)


def test_added_tensors_are_detached():
    metrics = Metrics(device=CPU)
    weight = torch.ones((), requires_grad=True)
    metrics.add("loss/ce", weight * 2, 1)
    assert not any(t.requires_grad for t in metrics._sums.values())


def test_restored_state_gives_the_same_means():
    metrics, resumed = Metrics(device=CPU), Metrics(device=CPU)
    for total, count in ((0.1, 3), (0.2, 5), (0.7, 2)):
        metrics.add("loss/ce", total, count)
    resumed.load_state(metrics.state())
    for m in (metrics, resumed):
        m.add("loss/ce", 0.3, 7)
    assert metrics.reduce() == resumed.reduce()


def test_every_metric_and_column_has_a_unit():
    names = {*PER_TOKEN_METRICS, *(c[0] for c in (*STEP_COLUMNS, *EVAL_COLUMNS)), *memory_record()}
    assert names <= set(UNITS), sorted(names - set(UNITS))


def test_peak_memory_grows_with_touched_memory():
    before = peak_host_bytes()
    block = torch.ones(max(before, 1 << 26), dtype=torch.uint8)
    assert peak_host_bytes() >= before + len(block) // 2
    assert memory_record(CPU)["memory/host_gib"] * 2**30 == pytest.approx(peak_host_bytes(), rel=0.01)
