"""Top-k lists and sparse targets over 1, 2 and 4 tensor-parallel ranks."""

import pytest
import torch
import torch.distributed as dist

from kdtrain.distributed.collectives import exchange_ranks
from kdtrain.teacher.estimators import ESTIMATORS
from kdtrain.teacher.sampling import sample_targets
from kdtrain.teacher.topk import TopKShare, linear_topk
from tests.support.loss_cases import cut_head
from tests.support.topk_cases import assert_same_topk, random_teacher, shard_of, slab_bytes_for, whole_logits

pytestmark = pytest.mark.dist

# vocabulary, rows are a multiple of, k, tokens per chunk, bias + scale + soft-cap.
# With 101 rows in multiples of 128 all ranks but the first hold only padding; with multiple 1 and 4 ranks, k = 40 and
# 101 are more than a rank has.
LAYOUTS = [
    (101, 1, 40, 8, False),
    (101, 1, 101, 37, False),
    (101, 128, 7, 8, True),
    (1000, 128, 16, 100, True),
    (1000, 1, 1, 8, False),
]


def _check_exact(rank: int, world_size: int) -> list[torch.Tensor]:
    """Integer logits: ties on all ranks, no rounding. Random float64 logits: no ties."""
    answers = []
    group = dist.group.WORLD
    for vocab, multiple, k, chunk, properties in LAYOUTS:
        shard = shard_of(vocab, group, multiple)
        for dtype, integers in ((torch.float32, True), (torch.float64, True), (torch.float64, False)):
            hidden, head = random_teacher(37, vocab, dtype=dtype, integers=integers, properties=properties)
            temperatures = (2.0, 1.0)
            got = linear_topk(
                hidden,
                cut_head(head, shard),
                k,
                shard=shard,
                group=group,
                temperatures=temperatures,
                slab_bytes=slab_bytes_for(chunk, shard, dtype),
            )
            tolerance = 3e-6 if dtype == torch.float32 else 1e-12
            assert_same_topk(got, whole_logits(hidden, head), k, temperatures, tolerance)
            answers += [got.ids, got.logits, got.lse, got.log_tail]
    return answers


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_lists_are_a_stable_sort_of_whole_logits_and_bitwise_equal_on_every_rank(rank_pool, world_size):
    first, *others = rank_pool(world_size).run(_check_exact)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def _own_tokens(rank: int, world_size: int, num_tokens: int, chunk: int) -> tuple[list[int], list[list[int]]]:
    group = dist.group.WORLD
    shard = shard_of(101, group, 1)
    hidden, head = random_teacher(num_tokens, 101, integers=True)
    slab_bytes = slab_bytes_for(chunk, shard, torch.float32)
    share = linear_topk(hidden, cut_head(head, shard), 5, shard=shard, group=group, slab_bytes=slab_bytes, gather=False)
    assert isinstance(share, TopKShare)
    assert len(share.tokens) == len(share.ids) == len(share.lse)
    assert_same_topk(share, whole_logits(hidden, head)[share.tokens], 5, (1.0,), 3e-6)
    return share.tokens.tolist(), share.ids.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_without_gather_each_rank_returns_its_share_of_the_tokens(rank_pool, world_size):
    for num_tokens, chunk in ((37, 8), (37, 100), (3, 8), (0, 8)):
        ranks = rank_pool(world_size).run(_own_tokens, num_tokens=num_tokens, chunk=chunk)
        assert sorted(t for tokens, _ in ranks for t in tokens) == list(range(num_tokens))
    assert len(ranks) == world_size


def _bad_logit_on_one_rank(rank: int, world_size: int, gather: bool) -> str:
    group = dist.group.WORLD
    shard = shard_of(101, group, 1)
    hidden, head = random_teacher(37, 101)
    mine = cut_head(head, shard)
    hidden[29:] *= -1e30
    hidden[29:].abs_()
    if rank == world_size - 1:
        mine.weight.data.fill_(1e30)  # overflows from token 29 on, here only
    else:
        mine.weight.data.zero_()
    with pytest.raises(ValueError, match=r"hidden_t\[29\] hold NaN or \+inf") as refused:
        linear_topk(
            hidden,
            mine,
            3,
            shard=shard,
            group=group,
            gather=gather,
            slab_bytes=slab_bytes_for(8, shard, torch.float32),
        )
    return str(refused.value)


@pytest.mark.parametrize("gather", [True, False])
def test_a_bad_logit_on_one_rank_raises_the_same_error_on_all(rank_pool, gather):
    assert len(set(rank_pool(4).run(_bad_logit_on_one_rank, gather=gather))) == 1


def _exchange(rank: int, world_size: int) -> torch.Tensor:
    with pytest.raises(ValueError, match="one row per rank"):
        exchange_ranks(torch.zeros(world_size + 1), dist.group.WORLD)
    sent = torch.arange(world_size, dtype=torch.float64)[:, None] + 10 * rank + torch.tensor([0.0, 0.5])
    return exchange_ranks(sent.T.contiguous().T, dist.group.WORLD)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_exchange_sends_row_j_to_rank_j(rank_pool, world_size):
    for rank, got in enumerate(rank_pool(world_size).run(_exchange)):
        assert got[:, 0].tolist() == [10 * source + rank for source in range(world_size)]
        assert (got[:, 1] - got[:, 0] == 0.5).all()


SETTINGS = {"top_k_samples": {"tail_samples": 5}, "top_p_k": {"top_p": 0.6}}


def _sample(rank: int, world_size: int, chunk: int, dtype: torch.dtype) -> list[dict[str, torch.Tensor | None]]:
    """Every estimator in every layout, on all tokens."""
    group = dist.group.WORLD
    answers = []
    for vocab, multiple, k, _, properties in [*LAYOUTS[:-1], (101, 1, 12, 0, None)]:
        shard = shard_of(vocab, group, multiple)
        integers = properties is None  # equal logits, also between kept and other ids
        hidden, head = random_teacher(37, vocab, dtype=dtype, properties=bool(properties), integers=integers)
        for estimator in ESTIMATORS:
            got = sample_targets(
                hidden,
                cut_head(head, shard),
                estimator=estimator,
                k=k,
                seed=11,
                sample_ids=torch.arange(37) // 3,
                positions=torch.arange(37) % 3,
                labels=torch.arange(37) * 3 - 6,
                temperature=2.0,
                shard=shard,
                group=group,
                slab_bytes=slab_bytes_for(chunk, shard, dtype),
                **SETTINGS.get(estimator, {}),
            )
            sums = got.weights.sum(1) + (0 if got.log_tail is None else got.log_tail.exp())
            assert (sums - 1).abs().max() < (2e-6 if dtype == torch.float32 else 1e-12)
            names = ("ids", "weights", "log_tail", "label_log_prob", "entropy")
            answers.append({name: getattr(got, name) for name in names})
    return answers


def test_targets_are_the_same_at_tp_1_2_and_4_and_on_every_rank(rank_pool):
    whole = rank_pool(1).run(_sample, chunk=37, dtype=torch.float64)[0]
    for world_size, chunk in ((1, 8), (2, 37), (4, 8)):
        first, *others = rank_pool(world_size).run(_sample, chunk=chunk, dtype=torch.float64)
        for answer, expected in zip(first, whole, strict=True):
            assert torch.equal(answer["ids"], expected["ids"])
            for name, value in expected.items():
                if value is None:
                    assert answer[name] is None
                else:
                    torch.testing.assert_close(answer[name], value, rtol=1e-10, atol=1e-12)
        for other in others:
            for a, b in zip(first, other, strict=True):
                assert all(a[n] is b[n] is None or torch.equal(a[n], b[n]) for n in a)


def test_float32_targets_over_ranks_differ_from_one_rank_in_few_draws(rank_pool):
    whole = rank_pool(1).run(_sample, chunk=37, dtype=torch.float32)[0]
    for answer, expected in zip(rank_pool(4).run(_sample, chunk=8, dtype=torch.float32)[0], whole, strict=True):
        assert (answer["ids"] != expected["ids"]).float().mean() < 0.01
        torch.testing.assert_close(answer["entropy"], expected["entropy"], rtol=1e-5, atol=1e-5)
