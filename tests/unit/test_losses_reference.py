"""The float64 definitions themselves: finite differences, limits and identities."""

import math

import pytest
import torch

from kdtrain.distributed.vocab import HeadShard
from kdtrain.losses import matrix, reference

torch.manual_seed(0)
STUDENT = 2 * torch.randn(5, 11, dtype=torch.float64)
TEACHER = STUDENT + torch.randn(5, 11, dtype=torch.float64)
KL = {"forward_kl": reference.forward_kl, "reverse_kl": reference.reverse_kl}


@pytest.mark.parametrize("name", reference.DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_autograd_of_every_definition_agrees_with_finite_differences(name, temperature):
    def value(x):
        return reference.DIVERGENCES[name](x, TEACHER, temperature=temperature)

    assert torch.autograd.gradcheck(value, STUDENT.clone().requires_grad_(), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", reference.DIVERGENCES)
def test_a_divergence_is_zero_for_equal_models_and_positive_otherwise(name):
    divergence = reference.DIVERGENCES[name]
    assert divergence(STUDENT, STUDENT).abs().max() < 1e-14
    assert divergence(STUDENT, TEACHER).min() > 1e-3


@pytest.mark.parametrize("name", reference.DIVERGENCES)
def test_common_offset_of_logits_changes_nothing(name):
    divergence = reference.DIVERGENCES[name]
    moved = divergence(STUDENT + 7.0, TEACHER - 3.0, temperature=1.5)
    torch.testing.assert_close(moved, divergence(STUDENT, TEACHER, temperature=1.5), rtol=1e-12, atol=1e-13)


def test_two_token_example_matches_hand_computed_values():
    p = torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert reference.forward_kl(q.log(), p.log()).item() == pytest.approx(expected, abs=1e-14)
    assert reference.tvd(q.log(), p.log()).item() == pytest.approx(0.25, abs=1e-14)
    # skew keeps a tenth of its own distribution: KL(p || 0.1 p + 0.9 q) and KL(q || 0.9 p + 0.1 q)
    skewed = 0.75 * math.log(0.75 / 0.525) + 0.25 * math.log(0.25 / 0.475)
    assert reference.skew_kl(q.log(), p.log(), skew=0.1).item() == pytest.approx(skewed, abs=1e-14)
    reverse = 0.5 * math.log(0.5 / 0.725) + 0.5 * math.log(0.5 / 0.275)
    assert reference.skew_reverse_kl(q.log(), p.log(), skew=0.1).item() == pytest.approx(reverse, abs=1e-14)


@pytest.mark.parametrize(("share", "limit"), [(1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")])
def test_normalised_jsd_tends_to_both_kls_and_equals_them_at_the_ends(share, limit):
    expected = KL[limit](STUDENT, TEACHER)
    torch.testing.assert_close(reference.jsd(STUDENT, TEACHER, teacher_share=share), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(reference.jsd(STUDENT, TEACHER, teacher_share=float(round(share))), expected)


def test_jsd_with_equal_shares_is_symmetric():
    torch.testing.assert_close(reference.jsd(STUDENT, TEACHER), reference.jsd(TEACHER, STUDENT))


@pytest.mark.parametrize(("alpha", "beta", "limit"), [(1.0, 0.0, "forward_kl"), (0.0, 1.0, "reverse_kl")])
@pytest.mark.parametrize("distance", [0.0, 1e-6])
def test_alpha_beta_tends_to_both_kls_and_equals_them_at_the_ends(alpha, beta, limit, distance):
    near = reference.alpha_beta(
        STUDENT, TEACHER, ab_alpha=abs(alpha - distance), ab_beta=abs(beta - distance), temperature=2.0
    )
    torch.testing.assert_close(near, KL[limit](STUDENT, TEACHER, temperature=2.0), rtol=1e-4, atol=1e-6)


def test_logit_mse_is_the_mean_over_the_vocabulary_of_the_centred_difference():
    gap = STUDENT - TEACHER
    torch.testing.assert_close(reference.logit_mse(STUDENT, TEACHER), gap.var(dim=-1, unbiased=False))


def test_total_loss_applies_temperature_squared_to_the_divergence_only():
    labels = torch.tensor([3, -100, 0, 10, 5])
    kd_weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0])
    ce_weight = torch.tensor([1.0, 0.0, 3.0, 0.5, 0.0])
    total = reference.total_loss(
        STUDENT, TEACHER, labels, divergence="jsd", temperature=3.0, kd_weight=kd_weight, ce_weight=ce_weight
    )
    kd = reference.jsd(STUDENT, TEACHER, temperature=3.0)
    ce = torch.nn.functional.cross_entropy(STUDENT, labels.clamp(min=0), reduction="none")
    torch.testing.assert_close(total, (9.0 * kd_weight * kd + ce_weight * ce).sum())


def test_head_logits_apply_bias_then_scale_then_cap_and_drop_padding_rows():
    hidden, weight, bias = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9)
    head = HeadShard(weight, bias, logit_scale=0.5, softcap=2.0)
    expected = 2.0 * torch.tanh(0.5 * (hidden.double() @ weight.double().T + bias.double()) / 2.0)
    torch.testing.assert_close(reference.head_logits(hidden, head, 7), expected[:, :7])


def test_every_cell_of_the_matrix_is_declared_and_refusals_give_the_reason():
    assert set(matrix.MATRIX) == {(d, t) for d in reference.DIVERGENCES for t in matrix.TARGETS}
    assert matrix.require("jsd", "dense").kind == "exact"
    with pytest.raises(ValueError, match="'jsd' on target = 'score' is refused: one number per sequence"):
        matrix.require("jsd", "score")
    with pytest.raises(ValueError, match=r"divergence = 'kl' is unknown; choose one of forward_kl"):
        matrix.require("kl", "dense")
    with pytest.raises(ValueError, match=r"target = 'cached' is unknown"):
        matrix.require("jsd", "cached")
