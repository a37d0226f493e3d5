"""The learning rate by tokens, and which parameters decay."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

from kdtrain.config.schema import OptimSection, ScheduleSection
from kdtrain.engine.optim import build_adamw, learning_rate, parameter_groups

PEAK, TOTAL, WARMUP = 2.0, 1000, 100


def rate_of(shape, **schedule):
    """The learning rate as a function of tokens."""
    section = ScheduleSection(**{"shape": shape, "warmup_tokens": WARMUP, "min_lr_ratio": 0.25, **schedule})
    return partial(learning_rate, schedule=section, peak=PEAK, total_tokens=TOTAL)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_every_schedule_warms_up_linearly_to_the_peak(shape):
    rate = rate_of(shape)
    assert rate(0) == 0.0
    assert rate(1) == pytest.approx(PEAK / WARMUP)
    assert rate(WARMUP // 2) == pytest.approx(PEAK / 2)
    assert rate(WARMUP) == PEAK


@pytest.mark.parametrize(
    ("shape", "tokens", "share"),
    [
        ("cosine", 325, 0.25 + 0.75 * 0.5 * (1 + math.sqrt(0.5))),  # a quarter of the way
        ("cosine", 550, 0.25 + 0.75 * 0.5),
        ("cosine", 1000, 0.25),
        ("linear", 325, 0.25 + 0.75 * 0.75),
        ("linear", 1000, 0.25),
        ("wsd", 900, 1.0),  # the last tenth decays by default
        ("wsd", 950, 0.25 + 0.75 * 0.5),
        ("wsd", 1000, 0.25),
        ("constant", 1000, 1.0),
    ],
)
def test_a_schedule_is_where_its_formula_says(shape, tokens, share):
    assert rate_of(shape)(tokens) == pytest.approx(PEAK * share)


def test_wsd_decays_over_decay_tokens():
    rate = rate_of("wsd", decay_tokens=400)
    assert rate(600) == PEAK
    assert rate(700) == pytest.approx(PEAK * (0.25 + 0.75 * 0.75))
    assert rate_of("wsd", decay_tokens=0)(1000) == PEAK


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_a_warm_up_over_the_whole_run_ends_at_the_peak(shape):
    rate = rate_of(shape, warmup_tokens=TOTAL, decay_tokens=0 if shape == "wsd" else None)
    assert rate(TOTAL) == PEAK


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_a_rate_never_rises_after_the_warm_up_nor_falls_below_its_floor(shape):
    rate = rate_of(shape)
    rates = [rate(tokens) for tokens in range(WARMUP, TOTAL + 300)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert min(rates) == pytest.approx(PEAK * 0.25)  # also past the end: the last step may overshoot total_tokens


def test_a_run_that_is_all_warm_up_ends_at_the_peak_rate():
    rate = rate_of("cosine", warmup_tokens=TOTAL)
    assert rate(TOTAL - 1) == pytest.approx(PEAK * 0.999)
    assert rate_of("constant", warmup_tokens=TOTAL)(TOTAL) == PEAK


def named_parameters():
    model = nn.Sequential(nn.Embedding(7, 3), nn.LayerNorm(3), nn.Linear(3, 5))
    model[2].weight.requires_grad_(False)
    return dict(model.named_parameters())


def test_matrices_decay_and_vectors_do_not():
    named = named_parameters()
    groups = parameter_groups(named.items(), 0.3)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [id(p) for p in groups[0]["params"]] == [id(named["0.weight"])]
    assert [id(p) for p in groups[1]["params"]] == [id(named[n]) for n in ("1.weight", "1.bias", "2.bias")]
    assert len(parameter_groups([("1.bias", named["1.bias"])], 0.3)) == 1, "an empty group would stop DeepSpeed"


def test_a_parameter_group_has_one_dtype_and_bfloat16_comes_first():
    named = {
        "a": nn.Parameter(torch.zeros(2)),
        "b": nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16)),
        "c": nn.Parameter(torch.zeros(2, 2)),
        "d": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)),
    }
    groups = [(group["params"], group["weight_decay"]) for group in parameter_groups(named.items(), 0.3)]
    want = [("b", 0.3), ("d", 0.0), ("c", 0.3), ("a", 0.0)]
    assert [([id(p) for p in params], decay) for params, decay in groups] == [([id(named[n])], d) for n, d in want]


def test_adamw_takes_its_settings_from_the_configuration():
    section = OptimSection(betas=(0.8, 0.7), eps=1e-3, weight_decay=0.2)
    adam = build_adamw(named_parameters().items(), section, torch.device("cpu"))
    for group, decay in zip(adam.param_groups, (0.2, 0.0), strict=True):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.7), 1e-3, decay)
        assert not group["fused"]
    on_host = build_adamw(named_parameters().items(), section, torch.device("cpu"), offload=True)
    assert all(group["fused"] for group in on_host.param_groups)
