"""Records made by a teacher: each estimator gets the right kind of loss, and draws are unbiased."""

from dataclasses import replace

import pytest
import torch

from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import reference
from kdtrain.losses.sparse_targets import target_kind
from kdtrain.teacher.sampling import sample_targets
from tests.support.loss_cases import identity_case, random_case, relative_error
from tests.support.sparse_cases import SparseCase, naive_sparse_answer, streamed_sparse_answer

ESTIMATORS = {
    "top_k": ({}, "top_k"),
    "top_k_tail": ({}, "top_k_tail"),
    "top_p_k": ({"top_p": 0.8}, "top_k_tail"),
    "random_sampling": ({}, "sampled"),
    "top_k_samples": ({"tail_samples": 4}, "sampled"),
    "adaptive_threshold": ({}, "sampled"),
}


def sampled(hidden, head, vocab_size, estimator, temperature):
    count = torch.arange(len(hidden))
    return sample_targets(
        hidden,
        head,
        estimator=estimator,
        k=8,
        seed=3,
        sample_ids=count,
        positions=count,
        temperature=temperature,
        shard=VocabShard.of(vocab_size, multiple=1),
        **ESTIMATORS[estimator][0],
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_records_of_every_estimator_match_the_gradient_of_the_reference(estimator, temperature):
    base = random_case(37, 101, properties=True, dtype=torch.float64, temperature=temperature)
    target = sampled(base.hidden_t, base.head_t, 101, estimator, temperature)
    assert target_kind(target) == ESTIMATORS[estimator][1]
    case = SparseCase(base, target, {"allow_biased": estimator == "top_k"})
    got, expected = streamed_sparse_answer(case)[0], naive_sparse_answer(case)
    assert relative_error(got.loss, expected.loss) < 1e-12
    for which in ("grad_hidden", "grad_weight", "grad_bias"):
        assert relative_error(getattr(got, which), getattr(expected, which)) < 1e-10


@pytest.mark.parametrize("estimator", [name for name, (_, kind) in ESTIMATORS.items() if kind == "sampled"])
def test_draws_give_the_dense_value_and_gradient_on_average(estimator):
    """Over 3000 tokens that differ in their draws only, in units of the mean's standard error."""
    copies, temperature = 3000, 2.0
    student, teacher = 2 * torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    base = identity_case(student.repeat(copies, 1), teacher.repeat(copies, 1), random_case(copies, 24, temperature=2.0))
    base = replace(base, kd_weight=torch.ones(copies), ce_weight=torch.zeros(copies))
    target = sampled(base.hidden_t, base.head_t, 24, estimator, temperature)
    got, _ = streamed_sparse_answer(SparseCase(base, target), chunk=500)
    x = student.clone().requires_grad_()
    kd = reference.forward_kl(x, teacher, temperature=temperature)
    (dense,) = torch.autograd.grad(temperature**2 * kd.sum(), x)
    for samples, truth in ((got.grad_hidden, dense[0]), (got.parts.kd[:, None], kd.detach())):
        spread = samples.std(0) / copies**0.5
        assert ((samples.mean(0) - truth).abs() <= 4.5 * spread + 1e-12).all()
        assert spread.max() > 1e-5, "nothing was random"
