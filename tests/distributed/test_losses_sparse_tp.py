"""The streamed loss on sparse records over 1, 2 and 4 tensor-parallel ranks: gradients, not just values."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import linear_cross_entropy, linear_sparse_kd_loss, matrix, reference, sparse_reference
from tests.support.loss_cases import cut_head, identity_case, random_case, relative_error, streamed_answer
from tests.support.sparse_cases import (
    SCHEMES,
    SparseCase,
    naive_sparse_answer,
    record_of,
    sparse_case,
    streamed_sparse_answer,
)

pytestmark = pytest.mark.dist

# vocabulary, rows are a multiple of, tokens per chunk, temperature, bias + scale + soft-cap.
# 101 in multiples of 128 leaves every rank but the first with padding only; 1000 over 4 ranks ends in a ragged shard.
LAYOUTS = [
    (101, 1, 8, 1.0, False),
    (101, 128, 8, 2.0, True),
    (1000, 128, 37, 1.0, True),
    (1000, 1, 100, 2.0, False),
]


def divergences_of(scheme):
    target = "top_k" if scheme == "truncated" else scheme
    return [name for name in matrix.F_DIVERGENCES if matrix.MATRIX[name, target].kind != "refused"]


def _agrees(case: SparseCase, *, multiple: int, chunk: int, tolerance: float) -> torch.Tensor:
    """This rank's answer against float64; returns what must be the same bits on every rank."""
    expected, base = naive_sparse_answer(case), case.base
    got, shard = streamed_sparse_answer(case, group=dist.group.WORLD, multiple=multiple, chunk=chunk)
    mine = slice(shard.start, shard.start + shard.valid_rows)
    where = f"{base.divergence} V={base.vocab_size} multiple={multiple} chunk={chunk} {base.parameters}"
    assert relative_error(got.loss, expected.loss) <= tolerance / 5, where
    assert relative_error(got.grad_hidden, expected.grad_hidden) <= tolerance, where
    error = (got.grad_weight.double() - expected.grad_weight[mine]).norm() / expected.grad_weight.norm()
    assert error <= tolerance, where
    if got.grad_bias is not None:
        error = (got.grad_bias.double() - expected.grad_bias[mine]).norm() / expected.grad_bias.norm()
        assert error <= tolerance, where
    student = reference.head_logits(base.hidden_s, base.head_s, base.vocab_size)
    kd = sparse_reference.sparse_kd(
        student,
        case.target,
        divergence=base.divergence,
        renormalise_student=case.settings.get("renormalise_student", False),
        **base.parameters,
    )
    torch.testing.assert_close(got.parts.kd.double(), kd, rtol=1e-5, atol=2e-5)
    return torch.cat([got.loss[None], got.parts.kd, got.parts.ce, got.parts.lse, got.grad_hidden.flatten()])


def _check_scheme(rank: int, world_size: int, scheme: str) -> list[torch.Tensor]:
    answers = []
    for name, layout in itertools.product(divergences_of(scheme), LAYOUTS):
        vocab, multiple, chunk, temperature, properties = layout
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10))[0 if properties else 1 :]:
            case = sparse_case(
                37, vocab, scheme, divergence=name, properties=properties, dtype=dtype, temperature=temperature
            )
            answers.append(_agrees(case, multiple=multiple, chunk=chunk, tolerance=tolerance))
    return answers


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_loss_and_gradients_over_ranks_match_the_reference_with_equal_bits_on_every_rank(rank_pool, scheme, world_size):
    first, *others = rank_pool(world_size).run(_check_scheme, scheme=scheme)
    assert len(first) == 6 * len(divergences_of(scheme))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def _check_d_logits(rank: int, world_size: int) -> None:
    """Identity heads: d(hidden) is d(logits), summed over ranks that each hold some columns."""
    rng = torch.Generator().manual_seed(1)
    student = 3 * torch.randn(37, 101, generator=rng)
    teacher = student + 0.7 * torch.randn(37, 101, generator=rng) + 20.0
    for scheme, temperature in itertools.product(("top_k_tail", "sampled", "conditional"), (1.0, 2.0)):
        record = record_of(teacher, scheme, 12, temperature=temperature)
        settings = {"allow_biased": True, "renormalise_student": scheme == "conditional"}
        for name in divergences_of(scheme):
            base = identity_case(student, teacher, random_case(37, 101, divergence=name, temperature=temperature))
            base = replace(base, ce_weight=torch.zeros(37), kd_weight=torch.ones(37))
            case = SparseCase(base, record, settings)
            got = streamed_sparse_answer(case, group=dist.group.WORLD)[0].grad_hidden.double() / temperature
            p = (teacher.double() / temperature).softmax(-1).norm(dim=-1)
            q = (student.double() / temperature).softmax(-1).norm(dim=-1)
            error = (got - naive_sparse_answer(case).grad_hidden / temperature).norm(dim=-1)
            assert (error / (p + q)).max() <= 1e-6, (scheme, name)
            assert (got.sum(-1).abs() / (p + q)).max() <= 1e-6, (scheme, name)


@pytest.mark.parametrize("world_size", [2, 4])
def test_rows_of_d_logits_over_ranks_match_to_1e_6_and_sum_to_zero(rank_pool, world_size):
    rank_pool(world_size).run(_check_d_logits)


def _check_limits(rank: int, world_size: int) -> None:
    """All ids kept: the dense loss. kd_weight 0: cross-entropy."""
    group = dist.group.WORLD
    base = random_case(37, 101, divergence="jsd", dtype=torch.float64, properties=True, temperature=2.0)
    logits = reference.head_logits(base.hidden_t, base.head_t, 101)
    record = record_of(logits, "top_k_tail", 101, temperature=2.0)
    p = (logits / 2.0).softmax(-1)
    whole = replace(record, ids=torch.arange(101).expand(37, -1), weights=p, log_tail=torch.full((37,), float("-inf")))
    got, _ = streamed_sparse_answer(SparseCase(base, whole), group=group, multiple=128)
    dense, _ = streamed_answer(base, group=group, multiple=128)
    torch.testing.assert_close(got.loss, dense.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.grad_hidden, dense.grad_hidden, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.grad_weight, dense.grad_weight, rtol=1e-9, atol=1e-12)

    off = replace(base, kd_weight=torch.zeros(37))
    got, shard = streamed_sparse_answer(SparseCase(off, record), group=group)
    hidden, head = base.hidden_s.clone().requires_grad_(), cut_head(base.head_s, shard)
    parts = linear_cross_entropy(hidden, head, base.labels, weight=base.ce_weight, shard=shard, group=group)
    parts.loss.backward()
    torch.testing.assert_close(got.loss, parts.loss.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(got.grad_hidden, hidden.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("world_size", [2, 4])
def test_record_of_all_ids_equals_the_dense_loss_and_kd_weight_zero_cross_entropy_over_ranks(rank_pool, world_size):
    rank_pool(world_size).run(_check_limits)


def _gradients_of_a_trunk(rank: int, world_size: int) -> list[torch.Tensor]:
    """A replicated layer below the loss, as in a model: its gradient must not carry a factor of tp."""
    case = sparse_case(37, 101, "top_k_tail", divergence="reverse_kl", dtype=torch.float64)
    shard = VocabShard.of(101, rank, world_size, multiple=1)
    trunk = torch.eye(16, dtype=torch.float64).requires_grad_()
    head = cut_head(case.base.head_s, shard)
    linear_sparse_kd_loss(
        case.base.hidden_s @ trunk,
        head,
        case.target,
        case.base.labels,
        divergence="reverse_kl",
        shard=shard,
        kd_weight=case.base.kd_weight,
        ce_weight=case.base.ce_weight,
        group=dist.group.WORLD,
    ).loss.backward()
    return [trunk.grad, head.weight.grad[: shard.valid_rows]]


def test_gradients_below_the_loss_are_the_same_at_tp_1_2_and_4(rank_pool):
    whole = rank_pool(1).run(_gradients_of_a_trunk)[0]
    for world_size in (2, 4):
        ranks = rank_pool(world_size).run(_gradients_of_a_trunk)
        for trunk, _ in ranks:
            torch.testing.assert_close(trunk, whole[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.cat([weight for _, weight in ranks]), whole[1], rtol=1e-10, atol=1e-12)
