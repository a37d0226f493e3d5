"""The learning rate by tokens, and which parameters decay."""

import itertools
import math

import pytest
import torch
from torch import nn

from kdtrain.config.schema import RunConfig
from kdtrain.engine.optim import build_adamw, learning_rate, parameter_groups

PEAK, TOTAL, WARMUP = 2.0, 1000, 100


def configuration(shape, **schedule):
    cfg = RunConfig()
    cfg.optim.lr, cfg.train.total_tokens = PEAK, TOTAL
    cfg.schedule.shape, cfg.schedule.warmup_tokens, cfg.schedule.min_lr_ratio = shape, WARMUP, 0.25
    for key, value in schedule.items():
        setattr(cfg.schedule, key, value)
    return cfg


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_every_schedule_warms_up_linearly_to_the_peak(shape):
    cfg = configuration(shape)
    assert learning_rate(0, cfg) == 0.0
    assert learning_rate(1, cfg) == pytest.approx(PEAK / WARMUP)
    assert learning_rate(WARMUP // 2, cfg) == pytest.approx(PEAK / 2)
    assert learning_rate(WARMUP, cfg) == PEAK


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
def test_schedule_equals_formula(shape, tokens, share):
    assert learning_rate(tokens, configuration(shape)) == pytest.approx(PEAK * share)


def test_wsd_decays_over_decay_tokens():
    cfg = configuration("wsd", decay_tokens=400)
    assert learning_rate(600, cfg) == PEAK
    assert learning_rate(700, cfg) == pytest.approx(PEAK * (0.25 + 0.75 * 0.75))
    assert learning_rate(1000, configuration("wsd", decay_tokens=0)) == PEAK


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_a_warm_up_over_the_whole_run_ends_at_the_peak(shape):
    cfg = configuration(shape, warmup_tokens=TOTAL)
    cfg.schedule.decay_tokens = 0 if shape == "wsd" else None
    assert learning_rate(TOTAL, cfg) == PEAK


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_a_rate_never_rises_after_the_warm_up_nor_falls_below_its_floor(shape):
    cfg = configuration(shape)
    rates = [learning_rate(tokens, cfg) for tokens in range(WARMUP, TOTAL + 300)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert min(rates) == pytest.approx(PEAK * 0.25)  # also past the end: the last step may overshoot total_tokens


def test_a_run_that_is_all_warm_up_ends_at_the_peak_rate():
    cfg = configuration("cosine", warmup_tokens=TOTAL)
    assert learning_rate(TOTAL - 1, cfg) == pytest.approx(PEAK * 0.999)
    assert learning_rate(TOTAL, configuration("constant", warmup_tokens=TOTAL)) == PEAK


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
    cfg = RunConfig()
    cfg.optim.betas, cfg.optim.eps, cfg.optim.weight_decay = (0.8, 0.7), 1e-3, 0.2
    adam = build_adamw(named_parameters().items(), cfg.optim, torch.device("cpu"))
    for group, decay in zip(adam.param_groups, (0.2, 0.0), strict=True):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.7), 1e-3, decay)
        assert not group["fused"]
    on_host = build_adamw(named_parameters().items(), cfg.optim, torch.device("cpu"), offload=True)
    assert all(group["fused"] for group in on_host.param_groups)
