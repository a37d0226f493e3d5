"""Cuts with several ranges per rank, and cuts that ranks share; which heads go where."""

import pytest
import torch

from kdtrain.parallel.cut import Cut, even_cut, fused_cut, padded_cut
from kdtrain.parallel.heads import HeadCut
from kdtrain.parallel.pieces import merge_tensors, split_tensor


def test_a_fused_cut_holds_the_ranges_of_its_parts_one_behind_the_other():
    cut = fused_cut([even_cut(0, 8, 2), even_cut(0, 4, 2), even_cut(0, 4, 2)])
    assert cut.segments == (((0, 4), (8, 10), (12, 14)), ((4, 8), (10, 12), (14, 16)))
    assert (cut.tp_size, cut.full_size, cut.held_size(1), cut.shared, cut.in_order) == (2, 16, 8, False, False)
    assert split_tensor(torch.arange(16), cut, 1).tolist() == [4, 5, 6, 7, 10, 11, 14, 15]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_fused_pieces_are_merged_back(dim, tp):
    full = torch.arange(13 * 13.0).reshape(13, 13)
    cut = fused_cut([even_cut(dim, 6, tp), even_cut(dim, 4, tp), even_cut(dim, 3, tp)])
    cut.check(13)
    assert torch.equal(merge_tensors([split_tensor(full, cut, rank) for rank in range(tp)], cut), full)


def test_ranks_share_a_piece_and_the_first_of_them_owns_it():
    cut = HeadCut.of(8, 2, 4).key_value_cut(0, 3)
    assert cut.pieces == ((0, 3), (0, 3), (3, 6), (3, 6))
    assert [cut.is_copy(rank) for rank in range(4)] == [False, True, False, True]
    assert cut.shared
    assert not cut.in_order
    cut.check(6)
    full = torch.randn(6, 2)
    assert torch.equal(merge_tensors([split_tensor(full, cut, rank) for rank in range(4)], cut), full)


def test_empty_pieces_are_no_copies():
    cut = padded_cut(0, 5, 4, 4)
    assert not cut.shared
    assert cut.in_order


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
def test_every_query_head_is_with_the_head_that_it_reads(heads, kv_heads, tp, query, key_value):
    cut = HeadCut.of(heads, kv_heads, tp)
    assert (cut.query, cut.key_value) == (query, key_value)
    cut.query_cut(0, 5).check(5 * heads)
    cut.key_value_cut(0, 5).check(5 * kv_heads)
    for (first, last), (low, high) in zip(cut.query, cut.key_value, strict=True):
        read = {head // (heads // kv_heads) for head in range(first, last)}
        assert read == set(range(low, high))
        assert (last - first) % (high - low) == 0, "stock attention repeats every key/value head equally often"


def test_more_ranks_than_query_heads_of_a_group_are_refused():
    with pytest.raises(ValueError, match="3 ranks for the 2 query heads"):
        HeadCut.of(4, 2, 5)


def test_parts_that_cannot_be_stacked_are_refused():
    with pytest.raises(ValueError, match="different dims or numbers of ranks, or padded"):
        fused_cut([even_cut(0, 4, 2), even_cut(1, 4, 2)])
    with pytest.raises(ValueError, match="different dims or numbers of ranks, or padded"):
        fused_cut([padded_cut(0, 4, 2, 4), padded_cut(0, 4, 2, 4)])
    with pytest.raises(ValueError, match="that ranks share"):
        fused_cut([even_cut(0, 4, 2), HeadCut.of(4, 1, 2).key_value_cut(0, 2)])


@pytest.mark.parametrize(
    "cut", [Cut(0, ((0, 2), (3, 5))), Cut(0, ((0, 3), (2, 5))), Cut(0, ((0, 2), (2, 4))), Cut(0, ((0, 5), (2, 5)))]
)
def test_ranges_that_are_no_partition_are_found(cut):
    with pytest.raises(ValueError, match="do not partition dim 0"):
        cut.check(5)
