"""Shard specs with several ranges per rank and with replicas; how heads are divided over ranks."""

import pytest
import torch

from kdtrain.parallel.heads import HeadSharding
from kdtrain.parallel.shard_spec import ShardSpec, even_spec, fused_spec, padded_spec
from kdtrain.parallel.shard_tensors import merge_tensors, split_tensor


def test_a_fused_spec_has_the_ranges_of_its_parts_in_order():
    spec = fused_spec([even_spec(0, 8, 2), even_spec(0, 4, 2), even_spec(0, 4, 2)])
    assert spec.segments == (((0, 4), (8, 10), (12, 14)), ((4, 8), (10, 12), (14, 16)))
    assert (spec.tp_size, spec.full_size, spec.held_size(1), spec.shared, spec.in_order) == (2, 16, 8, False, False)
    assert split_tensor(torch.arange(16), spec, 1).tolist() == [4, 5, 6, 7, 10, 11, 14, 15]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_fused_shards_are_merged_back(dim, tp):
    full = torch.arange(13 * 13.0).reshape(13, 13)
    spec = fused_spec([even_spec(dim, 6, tp), even_spec(dim, 4, tp), even_spec(dim, 3, tp)])
    spec.check(13)
    assert torch.equal(merge_tensors([split_tensor(full, spec, rank) for rank in range(tp)], spec), full)


def test_all_but_the_first_rank_of_a_shared_shard_are_replicas():
    spec = HeadSharding.of(8, 2, 4).key_value_spec(0, 3)
    assert spec.shards == ((0, 3), (0, 3), (3, 6), (3, 6))
    assert [spec.is_replica(rank) for rank in range(4)] == [False, True, False, True]
    assert spec.shared
    assert not spec.in_order
    spec.check(6)
    full = torch.randn(6, 2)
    assert torch.equal(merge_tensors([split_tensor(full, spec, rank) for rank in range(4)], spec), full)


def test_empty_shards_are_not_replicas():
    spec = padded_spec(0, 5, 4, 4)
    assert not spec.shared
    assert spec.in_order


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "query", "key_value"),
    [
        (4, 2, 2, ((0, 2), (2, 4)), ((0, 1), (1, 2))),
        (4, 2, 4, ((0, 1), (1, 2), (2, 3), (3, 4)), ((0, 1), (0, 1), (1, 2), (1, 2))),
        (8, 1, 2, ((0, 4), (4, 8)), ((0, 1), (0, 1))),
        (9, 3, 2, ((0, 6), (6, 9)), ((0, 2), (2, 3))),
        # one group has two ranks, which share its three query heads unevenly
        (9, 3, 4, ((0, 2), (2, 3), (3, 6), (6, 9)), ((0, 1), (0, 1), (1, 2), (2, 3))),
    ],
)
def test_every_query_head_is_with_its_key_value_head(heads, kv_heads, tp, query, key_value):
    heads_of_ranks = HeadSharding.of(heads, kv_heads, tp)
    assert (heads_of_ranks.query, heads_of_ranks.key_value) == (query, key_value)
    heads_of_ranks.query_spec(0, 5).check(5 * heads)
    heads_of_ranks.key_value_spec(0, 5).check(5 * kv_heads)
    for (first, last), (low, high) in zip(heads_of_ranks.query, heads_of_ranks.key_value, strict=True):
        read = {head // (heads // kv_heads) for head in range(first, last)}
        assert read == set(range(low, high))
        assert (last - first) % (high - low) == 0, "stock attention repeats every key/value head equally often"


def test_more_ranks_than_query_heads_of_a_group_are_refused():
    with pytest.raises(ValueError, match="3 ranks for the 2 query heads"):
        HeadSharding.of(4, 2, 5)


def test_parts_that_cannot_be_stacked_are_refused():
    with pytest.raises(ValueError, match="different dims or numbers of ranks, or padded"):
        fused_spec([even_spec(0, 4, 2), even_spec(1, 4, 2)])
    with pytest.raises(ValueError, match="different dims or numbers of ranks, or padded"):
        fused_spec([padded_spec(0, 4, 2, 4), padded_spec(0, 4, 2, 4)])
    with pytest.raises(ValueError, match="cannot stack specs with replicas"):
        fused_spec([even_spec(0, 4, 2), HeadSharding.of(4, 1, 2).key_value_spec(0, 2)])


@pytest.mark.parametrize(
    "spec",
    [
        ShardSpec(0, ((0, 2), (3, 5))),
        ShardSpec(0, ((0, 3), (2, 5))),
        ShardSpec(0, ((0, 2), (2, 4))),
        ShardSpec(0, ((0, 5), (2, 5))),
    ],
)
def test_ranges_that_are_not_a_partition_are_refused(spec):
    with pytest.raises(ValueError, match="do not partition dim 0"):
        spec.check(5)
