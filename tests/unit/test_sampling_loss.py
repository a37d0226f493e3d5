"""The sparse loss with sampled targets against the dense loss with the whole teacher."""

import math

import pytest
import torch

from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import linear_kd_loss, linear_sparse_kd_loss
from kdtrain.teacher.estimators import ESTIMATORS, UNBIASED, WITH_TAIL
from kdtrain.teacher.sampling import sample_targets
from tests.support.topk_cases import random_teacher

VOCAB, TEMPERATURE = 60, 2.0
SETTINGS = {"top_k_samples": {"tail_samples": 3}, "top_p_k": {"top_p": 1.0}}
SHARD = VocabShard.of(VOCAB, multiple=1)


def problem(num_tokens, dtype=torch.float64):
    """(student's hidden [T, 8] and head, teacher's hidden and head, constants of the loss)."""
    rng = torch.Generator().manual_seed(2)
    hidden = torch.randn(num_tokens, 8, generator=rng, dtype=torch.float64).to(dtype)
    head = torch.randn(VOCAB, 8, generator=rng, dtype=torch.float64).to(dtype)
    weights = {"kd_weight": torch.ones(num_tokens), "ce_weight": torch.zeros(num_tokens)}
    common = {"divergence": "forward_kl", "temperature": TEMPERATURE, "shard": SHARD, **weights}
    return hidden, head, *random_teacher(num_tokens, VOCAB, dtype=dtype), common


def sampled(hidden, head, estimator, k, seed=0):
    tokens = torch.arange(len(hidden))
    return sample_targets(
        hidden,
        head,
        estimator=estimator,
        k=k,
        seed=seed,
        sample_ids=tokens,
        positions=tokens,
        labels=tokens % VOCAB,
        temperature=TEMPERATURE,
        shard=SHARD,
        **SETTINGS.get(estimator, {}),
    )


def answer(loss, hidden, head, *teacher, **common):
    """(loss, per-token divergence [T], d hidden, d head)"""
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    parts = loss(hidden, head, *teacher, torch.zeros(len(hidden), dtype=torch.int64), **common)
    torch.autograd.backward(parts.loss)
    return parts.loss.detach(), parts.kd, hidden.grad, head.grad


@pytest.mark.parametrize("estimator", ["top_k", "top_k_tail", "top_p_k", "adaptive_threshold"])
def test_a_target_of_the_whole_vocabulary_gives_the_dense_loss_and_gradients(estimator):
    hidden, head, hidden_t, head_t, common = problem(37)
    target = sampled(hidden_t, head_t, estimator, VOCAB)
    dense = answer(linear_kd_loss, hidden, head, hidden_t, head_t, **common)
    sparse = answer(linear_sparse_kd_loss, hidden, head, target, **common, allow_biased=True)
    for got, expected in zip(sparse, dense, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_a_tail_bucket_gives_a_lower_bound_that_rises_with_k():
    hidden, head, hidden_t, head_t, common = problem(37)
    dense = answer(linear_kd_loss, hidden, head, hidden_t, head_t, **common)[1]
    last = torch.zeros(37, dtype=torch.float64)
    for k in (1, 4, 16, VOCAB):
        target = sampled(hidden_t, head_t, "top_k_tail", k)
        bound = answer(linear_sparse_kd_loss, hidden, head, target, **common, allow_biased=True)[1]
        assert (bound >= last - 1e-12).all(), k
        assert (bound <= dense + 1e-12).all(), k
        last = bound
    torch.testing.assert_close(last, dense, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("estimator", UNBIASED)
def test_the_expectation_of_loss_and_gradients_is_the_dense_one(estimator):
    """200 seeds. Every number's mean is within 4.5 standard errors of the dense value (of 961 numbers: chance 1 %,
    but the seeds are fixed), and the standard errors are a small part of what is estimated."""
    hidden, head, hidden_t, head_t, common = problem(60)
    loss, _, *gradients = answer(linear_kd_loss, hidden, head, hidden_t, head_t, **common)
    dense = torch.cat([loss[None], *(g.flatten() for g in gradients)])
    draws = []
    for seed in range(200):
        target = sampled(hidden_t, head_t, estimator, 10, seed)
        assert target.unbiased
        loss, _, *gradients = answer(linear_sparse_kd_loss, hidden, head, target, **common)
        draws.append(torch.cat([loss[None], *(g.flatten() for g in gradients)]))
    draws = torch.stack(draws)
    standard_error = draws.std(0) / math.sqrt(200)
    assert standard_error.norm() < 0.1 * dense.norm()
    assert ((draws.mean(0) - dense).abs() <= 4.5 * standard_error + 1e-12).all()
    assert ((draws[0] - dense).abs() > 1e-3).any(), "one draw is not the dense gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_loss_accepts_targets_of_every_estimator(estimator, dtype):
    hidden, head, hidden_t, head_t, common = problem(37, dtype)
    target = sampled(hidden_t, head_t, estimator, 10)
    assert target.unbiased == (estimator in UNBIASED)
    assert (target.log_tail is not None) == (estimator in WITH_TAIL)
    got = answer(linear_sparse_kd_loss, hidden, head, target, **common, allow_biased=True)
    assert all(value.isfinite().all() for value in got)
    assert got[2].norm() > 0
