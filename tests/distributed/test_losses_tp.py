"""The streamed losses over 1, 2 and 4 tensor-parallel ranks: gradients, not just values."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import linear_cross_entropy, reference, stream
from kdtrain.losses.label_sets import cross_entropy_of_label_sets
from kdtrain.losses.vocab_group import VocabGroup
from tests.support.loss_cases import (
    LossCase,
    cut_head,
    naive_answer,
    random_case,
    reference_fields,
    relative_error,
    streamed_answer,
)

pytestmark = pytest.mark.dist

ALL = list(reference.DIVERGENCES)
# vocabulary, rows are a multiple of, tokens per chunk, temperature, bias + scale + soft-cap.
# 101 in multiples of 128 leaves every rank but the first with padding only; 1000 over 4 ranks ends in a ragged shard.
LAYOUTS = [
    (101, 1, 1, 1.0, False),
    (101, 128, 8, 2.0, True),
    (1000, 128, 37, 1.0, True),
    (1000, 1, 100, 2.0, False),
]


def _assert_rank_agrees(case: LossCase, *, multiple: int, chunk: int, tolerance: float) -> torch.Tensor:
    """This rank's answer against float64; returns what must be the same bits on every rank."""
    expected = naive_answer(case)
    got, shard = streamed_answer(case, group=dist.group.WORLD, multiple=multiple, chunk=chunk, measure=True)
    mine = slice(shard.start, shard.start + shard.valid_rows)
    where = f"{case.divergence} V={case.vocab_size} multiple={multiple} chunk={chunk} {case.parameters}"
    assert relative_error(got.loss, expected.loss) <= 2e-6, where
    assert relative_error(got.grad_hidden, expected.grad_hidden) <= tolerance, where
    if shard.valid_rows:
        # the error of this rank's rows, measured against the whole gradient: a shard's own may be tiny
        error = (got.grad_weight.double() - expected.grad_weight[mine]).norm() / expected.grad_weight.norm()
        assert error <= tolerance, where
        if got.grad_bias is not None:
            error = (got.grad_bias.double() - expected.grad_bias[mine]).norm() / expected.grad_bias.norm()
            assert error <= tolerance, where
    fields = {name: getattr(got.parts, name) for name in reference_fields(case)}
    for name, value in reference_fields(case).items():
        torch.testing.assert_close(
            fields[name].double(), value, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    return torch.cat([got.loss[None], *fields.values(), got.grad_hidden.flatten()])


def _check_divergence(rank: int, world_size: int, name: str) -> list[torch.Tensor]:
    answers = []
    for vocab, multiple, chunk, temperature, properties in LAYOUTS:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            case = random_case(37, vocab, divergence=name, properties=properties, dtype=dtype, temperature=temperature)
            answers.append(_assert_rank_agrees(case, multiple=multiple, chunk=chunk, tolerance=tolerance))
    return answers


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradients_over_ranks_match_the_reference_with_equal_bits_on_every_rank(rank_pool, name, world_size):
    first, *others = rank_pool(world_size).run(_check_divergence, name=name)
    assert len(first) == 2 * len(LAYOUTS)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def _check_large_vocabulary(rank: int, world_size: int) -> None:
    for name in ("forward_kl", "reverse_kl", "jsd"):
        case = random_case(5, 50257, divergence=name, widths=(8, 8), temperature=2.0)
        _assert_rank_agrees(case, multiple=128, chunk=2, tolerance=1e-5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_vocabulary_of_50257_over_ranks_matches_the_reference(rank_pool, world_size):
    rank_pool(world_size).run(_check_large_vocabulary)


def _check_laws(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    for name in ALL:
        case = random_case(37, 101, divergence=name, properties=True, temperature=2.0)
        same = replace(case, hidden_t=case.hidden_s, head_t=case.head_s, ce_weight=torch.zeros(37))
        got, _ = streamed_answer(same, group=group, multiple=128)
        assert float(got.loss) == 0.0, name
        assert not got.grad_hidden.any(), name
        assert not got.grad_weight.any(), name

        plain_ce = replace(case, kd_weight=torch.zeros(37))
        got, shard = streamed_answer(plain_ce, group=group)
        hidden, head = case.hidden_s.clone().requires_grad_(), cut_head(case.head_s, shard)
        parts = linear_cross_entropy(
            hidden,
            head,
            case.labels,
            weight=case.ce_weight,
            shard=shard,
            group=group,
            slab_bytes=stream.bytes_per_token(VocabGroup(shard, group), torch.float32) * 8,
        )
        parts.loss.backward()
        assert torch.equal(got.loss, parts.loss.detach()), name
        assert torch.equal(got.grad_hidden, hidden.grad), name
        assert torch.equal(got.grad_weight, head.weight.grad[: shard.valid_rows]), name
        for of_set in cross_entropy_of_label_sets(
            case.hidden_s,
            head,
            [case.labels] * 2,
            weight=case.ce_weight,
            shard=shard,
            group=group,
            slab_bytes=stream.bytes_per_token(VocabGroup(shard, group), torch.float32) * 8,
        ):
            assert torch.equal(of_set.ce, parts.ce), name
            assert torch.equal(of_set.loss, parts.loss.detach()), name


@pytest.mark.parametrize("world_size", [2, 4])
def test_equal_models_give_zero_and_kd_weight_zero_is_bitwise_cross_entropy_over_ranks(rank_pool, world_size):
    rank_pool(world_size).run(_check_laws)


def _gradients_of_a_trunk(rank: int, world_size: int) -> list[torch.Tensor]:
    """A replicated layer below the loss, as in a model: its gradient must not carry a factor of tp."""
    group = dist.group.WORLD
    case = random_case(37, 101, divergence="jsd", dtype=torch.float64)
    shard = VocabShard.of(101, rank, world_size, multiple=1)
    trunk = torch.eye(16, dtype=torch.float64).requires_grad_()
    head = cut_head(case.head_s, shard)
    parts = linear_cross_entropy(
        case.hidden_s @ trunk, head, case.labels, weight=case.ce_weight, shard=shard, group=group
    )
    parts.loss.backward()
    return [trunk.grad, head.weight.grad[: shard.valid_rows]]


def test_gradients_below_the_loss_are_the_same_at_tp_1_2_and_4(rank_pool):
    whole = rank_pool(1).run(_gradients_of_a_trunk)[0]
    for world_size in (2, 4):
        ranks = rank_pool(world_size).run(_gradients_of_a_trunk)
        for trunk, _ in ranks:
            torch.testing.assert_close(trunk, whole[0], rtol=1e-10, atol=1e-12)
        rows = torch.cat([weight for _, weight in ranks])
        torch.testing.assert_close(rows, whole[1], rtol=1e-10, atol=1e-12)
