"""Accuracy of the streamed losses in one process: values and gradients against float64 definitions."""

from dataclasses import replace

import pytest
import torch
from kdtrain_kernels.matmul import UPCAST_ELEMENTS

from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import linear_cross_entropy, reference
from tests.support.loss_cases import (
    VARIANT_IDS,
    VARIANTS,
    identity_case,
    loss_of,
    naive_answer,
    random_case,
    reference_fields,
    relative_error,
    streamed_answer,
)

ALL = list(reference.DIVERGENCES)


@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=VARIANT_IDS)
def test_float64_loss_and_gradients_match_the_reference_to_1e_10(name, parameters):
    for chunk, temperature, properties in [(1, 1.0, True), (8, 2.0, False), (37, 0.7, True), (1000, 1.0, False)]:
        case = random_case(
            37,
            101,
            divergence=name,
            dtype=torch.float64,
            properties=properties,
            temperature=temperature,
            **parameters,
        )
        expected = naive_answer(case)
        got, _ = streamed_answer(case, chunk=chunk, multiple=128)
        assert got.loss.dtype == torch.float64
        assert relative_error(got.loss, expected.loss) < 1e-12
        assert relative_error(got.grad_hidden, expected.grad_hidden) < 1e-10
        assert relative_error(got.grad_weight, expected.grad_weight) < 1e-10
        if properties:
            assert relative_error(got.grad_bias, expected.grad_bias) < 1e-10


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("vocab", "tokens"), [(101, 37), (1000, 37), (50257, 5)])
def test_float32_gradient_error_is_at_most_three_times_the_naive_formulas(name, vocab, tokens):
    for temperature in (1.0, 2.0):
        case = random_case(tokens, vocab, divergence=name, properties=vocab == 1000, temperature=temperature)
        expected, naive = naive_answer(case), naive_answer(case, torch.float32)
        got, _ = streamed_answer(case, chunk=8, multiple=128)
        assert abs(float(got.loss) / float(expected.loss) - 1) < 2e-6
        for which in ("grad_hidden", "grad_weight"):
            error = relative_error(getattr(got, which), getattr(expected, which))
            own = relative_error(getattr(naive, which), getattr(expected, which))
            assert error <= 3 * own + 1e-6, which
            assert error <= 1e-5, which


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("offset", [0.0, 80.0])
def test_rows_of_d_logits_match_to_1e_6_and_sum_to_zero(name, offset):
    rng = torch.Generator().manual_seed(1)
    student = 3 * torch.randn(37, 101, generator=rng) + offset
    teacher = student + 0.7 * torch.randn(37, 101, generator=rng) - 1.5 * offset
    for temperature in (1.0, 2.0):
        base = random_case(37, 101, divergence=name, temperature=temperature)
        case = identity_case(student, teacher, base)
        expected = naive_answer(case).grad_hidden
        got = streamed_answer(case, chunk=8)[0].grad_hidden.double()
        p = (teacher.double() / temperature).softmax(-1)
        q = (student.double() / temperature).softmax(-1)
        # every softmax in the row counts, with the weight it has in the gradient
        scale = base.kd_weight * temperature * (p.norm(dim=-1) + q.norm(dim=-1))
        scale = scale + base.ce_weight * (student.double().softmax(-1).norm(dim=-1) + 1)
        assert ((got - expected).norm(dim=-1) / scale).max() <= 1e-6
        assert (got.sum(-1).abs() / scale).max() <= 1e-6


def test_cross_entropy_matches_torch():
    case = random_case(37, 1000, dtype=torch.float64)
    hidden, weight = case.hidden_s.clone().requires_grad_(), case.head_s.weight.clone().requires_grad_()
    shard = VocabShard.of(1000, multiple=1)
    parts = linear_cross_entropy(
        hidden, weight, case.labels, weight=case.ce_weight, shard=shard, slab_bytes=2 * 8 * 1024 * 5
    )
    (2.5 * parts.loss).backward()
    h, w = case.hidden_s.clone().requires_grad_(), case.head_s.weight.clone().requires_grad_()
    ce = torch.nn.functional.cross_entropy(h @ w.T, case.labels, reduction="none", ignore_index=-100)
    (2.5 * case.ce_weight.double() * ce).sum().backward()
    torch.testing.assert_close(parts.ce, ce.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden.grad, h.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weight.grad, w.grad, rtol=1e-10, atol=1e-12)


def test_measured_values_match_their_definitions():
    case = random_case(37, 101, divergence="jsd", dtype=torch.float64, properties=True, temperature=2.0)
    parts = streamed_answer(case, measure=True, multiple=128)[0].parts
    for name, value in reference_fields(case).items():
        torch.testing.assert_close(getattr(parts, name), value, rtol=1e-10, atol=1e-12, msg=name)
        assert not getattr(parts, name).requires_grad
    plain = streamed_answer(case)[0].parts
    assert plain.kd is not None
    assert plain.student_entropy is plain.forward_kl is plain.tvd is plain.agreement is None


@pytest.mark.parametrize("name", ALL)
def test_extreme_logits_give_finite_gradients(name):
    student = torch.tensor([[0.0, -300.0, 40.0], [90.0, 0.0, -90.0]])
    teacher = torch.tensor([[40.0, -300.0, 0.0], [-90.0, 0.0, 90.0]])
    case = identity_case(student, teacher, random_case(2, 3, divergence=name))
    case = replace(case, kd_weight=torch.ones(2), ce_weight=torch.zeros(2))
    got = streamed_answer(case)[0]
    expected = reference.DIVERGENCES[name](student, teacher)
    torch.testing.assert_close(got.parts.kd.double(), expected, rtol=1e-5, atol=1e-6)
    assert got.grad_hidden.isfinite().all()


def test_bfloat16_error_is_one_rounding_of_the_gradient():
    for name in ALL:
        case = random_case(37, 1000, divergence=name, dtype=torch.bfloat16, widths=(64, 64))
        expected = naive_answer(case)
        got, _ = streamed_answer(case)
        assert got.loss.dtype == torch.float32
        assert got.grad_hidden.dtype == got.grad_weight.dtype == torch.bfloat16
        assert abs(float(got.loss) / float(expected.loss) - 1) < 2e-6
        # one rounding of the finished gradient to 8 bits: at most 2^-9 per element
        assert relative_error(got.grad_hidden, expected.grad_hidden) < 2**-9
        assert relative_error(got.grad_weight, expected.grad_weight) < 2**-9


@pytest.mark.parametrize("factor", [1 / 3, 1 / 777, 1 / 1000003])
def test_bfloat16_gradient_is_rounded_once_after_the_upstream_factor(factor):
    """1 / tokens is inexact in bfloat16: rounding it would scale all gradients by up to 0.2 percent."""
    case = random_case(37, 1000, dtype=torch.bfloat16, widths=(64, 64))
    expected = naive_answer(case)
    hidden, weight = case.hidden_s.clone().requires_grad_(), case.head_s.weight.clone().requires_grad_()
    (loss_of(case, hidden_s=hidden, head_s=weight).loss * factor).backward()
    for got, right in ((hidden.grad, expected.grad_hidden), (weight.grad, expected.grad_weight)):
        right = right * factor
        assert relative_error(got, right) < 2**-9
        bias = float((got.double() * right).sum() / right.square().sum()) - 1
        assert abs(bias) < 2e-4, "scaled as a whole"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("skew_reverse_kl", {"skew": 1e-3}),
        ("skew_reverse_kl", {"skew": 1e-4}),
        ("skew_reverse_kl", {"skew": 0.9}),
        ("skew_kl", {"skew": 1e-4}),
        ("skew_kl", {"skew": 0.97}),
        ("jsd", {"teacher_share": 1e-2}),
        ("jsd", {"teacher_share": 0.99}),
        ("alpha_beta", {"ab_alpha": 1.0, "ab_beta": 0.01}),
    ],
)
@pytest.mark.parametrize("apart", [1.0, 0.01])
def test_float32_is_accurate_near_the_ends_of_a_parameters_range(name, parameters, apart):
    rng = torch.Generator().manual_seed(5)
    student = torch.randn(9, 500, generator=rng) * 2
    teacher = student + apart * torch.randn(9, 500, generator=rng)
    case = replace(
        identity_case(student, teacher, random_case(9, 500, divergence=name, **parameters)),
        kd_weight=torch.ones(9),
        ce_weight=torch.zeros(9),
    )
    got = streamed_answer(case)[0].grad_hidden.double()
    scale = teacher.double().softmax(-1).norm(dim=1) + student.double().softmax(-1).norm(dim=1)
    error = float(((got - naive_answer(case).grad_hidden).norm(dim=1) / scale).max())
    assert error <= 1e-6


def test_half_precision_head_upcast_in_pieces_gives_the_same_product():
    case = random_case(3, 20011, dtype=torch.bfloat16, widths=(128, 96))  # 2.5 pieces
    assert case.head_s.weight.numel() > 2 * UPCAST_ELEMENTS
    expected, got = naive_answer(case), streamed_answer(case)[0]
    assert relative_error(got.loss, expected.loss) < 2e-6
    assert relative_error(got.grad_hidden, expected.grad_hidden) < 2**-9
    assert relative_error(got.grad_weight, expected.grad_weight) < 2**-9


def test_student_and_teacher_may_differ_in_width_and_dtype():
    case = random_case(9, 101, dtype=torch.float32)
    half = HeadShard(case.head_t.weight.bfloat16())
    mixed = replace(case, hidden_t=case.hidden_t.bfloat16(), head_t=half)
    got, expected = streamed_answer(mixed)[0], naive_answer(mixed)
    assert relative_error(got.grad_hidden, expected.grad_hidden) < 1e-6
