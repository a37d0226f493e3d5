"""Streamed losses in one process against the float64 reference: loss, d(logits), d(hidden), d(head), d(bias)."""

import itertools
from dataclasses import replace

import pytest
import torch

from kdtrain.dist.vocab import VocabShard
from kdtrain.losses import reference
from kdtrain.testing.loss_cases import (
    NAIVE,
    LossCase,
    identity_problem,
    make_problem,
    naive_result,
    reference_logits,
    reference_result,
    relative_error,
    streamed,
)

DIVERGENCES = sorted(reference.DIVERGENCES)
CHUNKS = (1, 8, 37, 64)
PARAMETERS = {
    "jsd": ({}, {"teacher_share": 0.1}, {"teacher_share": 0.9}),
    "skew_kl": ({}, {"skew": 0.5}),
    "skew_reverse_kl": ({}, {"skew": 0.5}),
    "alpha_beta": ({}, {"ab_alpha": 0.2, "ab_beta": 0.7}, {"ab_alpha": 1.5, "ab_beta": -0.5}),
}


def gradients(result, vocab):
    """Name -> gradient over real rows, as far as there is one."""
    named = {"hidden": result.hidden, "weight": result.weight[:vocab]}
    return named if result.bias is None else named | {"bias": result.bias[:vocab]}


def assert_matches(case, problem, shard, limit):
    """Loss and every gradient within a relative `limit` of the reference; padding rows exactly 0."""
    _, got = streamed(case, problem, shard)
    want = reference_result(case, problem)
    assert relative_error(got.loss, want.loss) <= limit, "loss"
    reference_gradients = gradients(want, case.vocab)
    for name, gradient in gradients(got, case.vocab).items():
        assert relative_error(gradient, reference_gradients[name]) <= limit, name
    assert not got.weight[case.vocab :].any()
    assert got.bias is None or not got.bias[case.vocab :].any()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float64_agrees_with_the_reference_at_any_chunk_and_vocabulary(divergence, chunk):
    choices = PARAMETERS.get(divergence, ({},))
    grid = itertools.product((101, 1000, 5003), (1.0, 2.0))
    for number, (vocab, temperature) in enumerate(grid):
        case = LossCase(
            divergence,
            vocab=vocab,
            temperature=temperature,
            chunk=chunk,
            multiple=(1, 128)[number // 2 % 2],
            dressed=bool((number + chunk) % 2),
            parameters=tuple(choices[number % len(choices)].items()),
        )
        shard = VocabShard.of(vocab, multiple=case.multiple)
        assert_matches(case, make_problem(case, seed=number), shard, 1e-10)


@pytest.mark.parametrize("dressed", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_stays_within_1e5_and_three_times_the_naive_error(divergence, temperature, dressed):
    for vocab, ce in ((101, 0.0), (1000, 1.0), (5003, 0.0)):
        case = LossCase(divergence, vocab, temperature=temperature, dtype=torch.float32, dressed=dressed, ce=ce)
        problem = make_problem(case, seed=vocab)
        kl = reference.forward_kl(*reference_logits(problem), temperature=temperature)
        assert 0.1 <= kl.mean() <= 5, "the stated range of the criterion"
        _, got = streamed(case, problem, VocabShard.of(vocab))
        want, naive = reference_result(case, problem), naive_result(case, problem)
        assert relative_error(got.loss, want.loss) <= 3 * relative_error(naive.loss, want.loss) + 1e-6
        wanted, naives = gradients(want, vocab), gradients(naive, vocab)
        for name, gradient in gradients(got, vocab).items():
            error, own = relative_error(gradient, wanted[name]), relative_error(naives[name], wanted[name])
            assert error <= 1e-5, (name, vocab, error)
            assert error <= 3 * own + 1e-6, (name, vocab, error, own)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16_inputs_lose_no_more_than_the_naive_formula_on_them(divergence, temperature):
    """Naive: the same bfloat16 hidden states and heads upcast to float32, float32 logits and autograd, which rounds
    gradients back to bfloat16. Both against float64 on the same bfloat16 numbers; ours may add 1e-4 relative, a
    twentieth of that last rounding."""
    case = LossCase(divergence, 1000, temperature=temperature, dtype=torch.bfloat16, dressed=True)
    problem = make_problem(case)
    _, got = streamed(case, problem, VocabShard.of(1000))
    want, naive = reference_result(case, problem), naive_result(case, problem)
    assert got.hidden.dtype == got.weight.dtype == got.bias.dtype == torch.bfloat16
    assert got.loss.dtype == torch.float32
    assert relative_error(got.loss, want.loss) <= 3 * relative_error(naive.loss, want.loss) + 1e-6
    wanted, naives = gradients(want, 1000), gradients(naive, 1000)
    for name, gradient in gradients(got, 1000).items():
        own = relative_error(naives[name], wanted[name])
        assert own < 3e-3, "one rounding to bfloat16, nothing worse"
        assert relative_error(gradient, wanted[name]) <= own + 1e-4, name


def row_errors(case, problem):
    """[T] norms of the error of d(D)/d(logits), and norm p + norm q per row at the loss temperature."""
    _, got = streamed(case, problem, VocabShard.of(case.vocab))
    want = reference_result(case, problem)
    student, teacher = (logits.double() / case.temperature for logits in (problem.hidden_s, problem.hidden_t))
    size = student.softmax(1).norm(dim=1) + teacher.softmax(1).norm(dim=1)
    return (got.hidden.double() - want.hidden).norm(dim=1), size, got.hidden


@pytest.mark.parametrize("offset", [(0.0, 0.0), (80.0, -60.0)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_logit_gradient_rows_err_by_at_most_1e6_of_p_plus_q(divergence, offset):
    for vocab, temperature, spread in ((101, 1.0, 1.0), (1000, 2.0, 3.0), (1000, 1.0, 2.0)):
        draw = torch.Generator().manual_seed(vocab)
        student, teacher = (torch.randn(2, 37, vocab, generator=draw) * spread).unbind(0)
        case = LossCase(divergence, vocab, temperature=temperature, dtype=torch.float32)
        problem = identity_problem(student + offset[0], teacher + offset[1])
        error, size, gradient = row_errors(case, problem)
        # the loss carries temperature^2 and the logits 1 / temperature; sizes are those of probabilities
        worst = float((error / (temperature * size)).max())
        assert worst <= 1e-6, (vocab, temperature, worst)
        assert gradient.double().sum(1).abs().max() <= 1e-6 * temperature * 2, "rows sum to 0; p and q sum to 1 each"


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sharp_and_masked_logits_give_finite_gradients(divergence):
    draw = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 37, 101, generator=draw) * 40).unbind(0)
    case = LossCase(divergence, 101, dtype=torch.float32)
    parts, got = streamed(case, identity_problem(student, teacher), VocabShard.of(101))
    assert torch.isfinite(got.hidden).all()
    assert torch.isfinite(parts.loss)
    if divergence != "logit_mse":  # squared differences of infinite logits have no value
        student[:, 7] = teacher[:, 7] = float("-inf")
        student_64, teacher_64 = student.double(), teacher.double()
        keep = torch.arange(101) != 7
        small = replace(case, vocab=100)
        _, want = streamed(small, identity_problem(student_64[:, keep], teacher_64[:, keep]), VocabShard.of(100))
        # an identity head cannot carry -inf (0 * inf is nan): a bias can
        problem = identity_problem(student.where(keep, 0.0), teacher.where(keep, 0.0))
        bias = torch.zeros(101).where(keep, float("-inf"))
        problem = replace(problem, head_s=replace(problem.head_s, bias=bias), head_t=replace(problem.head_t, bias=bias))
        _, got = streamed(case, problem, VocabShard.of(101))
        assert not got.hidden[:, 7].any()
        # log p / q reaches 200 here, of which float32 resolves 1.5e-5
        torch.testing.assert_close(got.hidden[:, keep].double(), want.hidden, rtol=0, atol=3e-5)


def test_every_divergence_has_a_naive_formula_to_be_measured_against():
    assert sorted(NAIVE) == DIVERGENCES
