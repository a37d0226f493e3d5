"""The conformance check accepts right losses and reports the error of wrong ones, at tp 1, 2 and 4."""

import pytest
import torch
import torch.distributed.nn.functional as differentiable

from kdtrain.distributed.collectives import reduce_from_tp
from kdtrain.losses import linear_kd_loss
from kdtrain.testing.conformance import Mode, check

pytestmark = pytest.mark.dist

FORWARD = (Mode("forward_kl"), Mode("forward_kl", 2.0))


def _parts(student, teacher, temperature):
    """Per token: the exponential sums and sum e^y (y - x) of this rank's columns."""
    x, y = student / temperature, teacher / temperature
    return torch.stack([x.exp().sum(-1), y.exp().sum(-1), (y.exp() * (y - x)).sum(-1)])


def _forward_kl(parts):
    sum_s, sum_t, cross = parts
    return (cross / sum_t + sum_s.log() - sum_t.log()).sum()


def whole(student, teacher, labels, *, group, shard, divergence, temperature):
    """Forward KL with one forward reduction, whose gradient passes back unchanged: right."""
    return temperature**2 * _forward_kl(reduce_from_tp(_parts(student, teacher, temperature), group))


def reduced_twice(student, teacher, labels, *, group, shard, divergence, temperature):
    """The same through an all-reduce that sums gradients as well: every rank's copy of the loss counts."""
    parts = differentiable.all_reduce(_parts(student, teacher, temperature), group=group)
    return temperature**2 * _forward_kl(parts)


def mean_over_tokens(student, teacher, labels, **arguments):
    return whole(student, teacher, labels, **arguments) / len(labels)


def without_temperature_squared(student, teacher, labels, *, temperature, **arguments):
    return whole(student, teacher, labels, temperature=temperature, **arguments) / temperature**2


def streamed(hidden_s, head_s, hidden_t, head_t, labels, *, group, shard, **divergence):
    ones = torch.ones(len(labels), dtype=hidden_s.dtype)
    return linear_kd_loss(
        hidden_s,
        head_s,
        hidden_t,
        head_t,
        labels,
        kd_weight=ones,
        ce_weight=0 * ones,
        shard=shard,
        group=group,
        **divergence,
    ).loss


def hidden_not_reduced(hidden_s, head_s, hidden_t, head_t, labels, **arguments):
    """Right value and d(head); d(hidden) is each rank's part only."""
    return whole(hidden_s @ head_s.T, hidden_t @ head_t.T, labels, **arguments)


def fails(student, teacher, labels, **arguments):
    return student.sum() * (1 / 0)


def test_a_correct_loss_on_logits_is_right_at_every_tp(rank_pool):
    findings = check(whole, modes=FORWARD, pool=rank_pool)
    assert [(f.mode, f.tp) for f in findings] == [(str(mode), tp) for mode in FORWARD for tp in (1, 2, 4)]
    assert [f.verdict for f in findings] == ["right"] * 6


def test_an_extra_reduction_gives_a_right_value_and_a_gradient_tp_times_too_long(rank_pool):
    findings = check(reduced_twice, modes=FORWARD[:1], pool=rank_pool)
    assert [f.verdict for f in findings] == ["right", "2 times too long", "4 times too long"]
    assert max(f.loss_error for f in findings) <= 1e-6
    assert min(f.cosine for f in findings) >= 1 - 1e-6


def test_a_mean_passes_only_where_it_is_declared(rank_pool):
    declared = check(mean_over_tokens, modes=FORWARD[:1], tp=(2,), reduction="mean", pool=rank_pool)
    undeclared = check(mean_over_tokens, modes=FORWARD[:1], tp=(2,), pool=rank_pool)
    assert [f.verdict for f in declared + undeclared] == ["right", "wrong value"]


def test_a_missing_temperature_factor_shows_unless_declared(rank_pool):
    subject = {"loss": without_temperature_squared, "modes": FORWARD, "tp": (2,), "pool": rank_pool}
    assert [f.verdict for f in check(**subject)] == ["right", "wrong value"]
    assert [f.verdict for f in check(**subject, temperature_squared=False)] == ["right", "right"]


def test_a_missing_reduction_of_hidden_states_is_reported_for_its_gradient(rank_pool):
    findings = check(hidden_not_reduced, on="hidden", modes=FORWARD[:1], tp=(1, 2), pool=rank_pool)
    assert [(f.gradient, f.tp, f.verdict) for f in findings] == [
        ("hidden_s", 1, "right"),
        ("head_s", 1, "right"),
        ("hidden_s", 2, "wrong direction"),
        ("head_s", 2, "right"),
    ]


def test_the_streamed_loss_is_right_in_float64_to_twelve_digits(rank_pool):
    modes = [Mode("forward_kl", 2.0), Mode("jsd", 1.0, {"teacher_share": 0.3})]
    findings = check(streamed, on="hidden", modes=modes, dtype=torch.float64, pool=rank_pool)
    assert len(findings) == 2 * 3 * 2
    for finding in findings:
        assert finding.loss_error <= 1e-12, finding
        assert abs(finding.norm_ratio - 1) <= 1e-12, finding
        assert finding.cosine >= 1 - 1e-12, finding


def test_a_loss_that_fails_on_a_rank_is_reported_with_its_traceback(rank_pool):
    with pytest.raises(AssertionError, match=r"(?s)rank 0 of 1: ZeroDivisionError.*in fails"):
        check(fails, modes=FORWARD, tp=(1,), pool=rank_pool)


def test_a_mode_without_a_definition_is_refused(rank_pool):
    with pytest.raises(AssertionError, match="divergence = 'mine' has no definition here; declare"):
        check(whole, modes=[Mode("mine")], tp=(1,), pool=rank_pool)
