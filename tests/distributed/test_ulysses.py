"""Ulysses: attention over cp ranks equals attention over the whole sequence, in value and gradients."""

import pytest
import torch
import torch.nn.functional as F

from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError, ParallelError
from kdtrain.parallel.ulysses import gather_sequence, scatter_sequence

pytestmark = pytest.mark.dist

SEQUENCES, TOKENS = 3, 8
HEADS = ((4, 4, 6, 6), (4, 2, 6, 6), (4, 1, 6, 6), (12, 6, 6, 6), (8, 4, 6, 10))
"""Query heads, key/value heads, widths of keys and of values."""


def inputs(heads):
    query_heads, kv_heads, width, value_width = heads
    generator = torch.Generator().manual_seed(3)
    shapes = ((query_heads, width), (kv_heads, width), (kv_heads, value_width))
    found = [torch.randn(SEQUENCES, h, TOKENS, d, generator=generator, dtype=torch.float64) for h, d in shapes]
    return found, torch.randn(SEQUENCES, TOKENS, query_heads, value_width, generator=generator, dtype=torch.float64)


def attention(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)


def compare(rank, world_size, heads, strided):
    """Worst relative errors of the output and of the three gradients on this rank's tokens."""
    mesh = Mesh.build(1, world_size)
    tensors, pull = inputs(heads)
    whole = [x.clone().requires_grad_() for x in tensors]
    expected = attention(*whole)
    (expected * pull).sum().backward()
    mine = slice(rank * TOKENS // world_size, (rank + 1) * TOKENS // world_size)
    parts = [x[:, :, mine].clone().requires_grad_() for x in tensors]
    output = scatter_sequence(attention(*gather_sequence(*parts, mesh.cp_group)), mesh.cp_group)
    grad = pull[:, mine]
    if strided:  # as autograd may pass it: not contiguous
        grad = grad.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
        assert not grad.is_contiguous()
    output.backward(grad)
    pairs = [
        (output, expected[:, mine]),
        *((part.grad, x.grad[:, :, mine]) for part, x in zip(parts, whole, strict=True)),
    ]
    return [float((found - right).detach().abs().max() / right.abs().max()) for found, right in pairs]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("heads", HEADS)
def test_attention_over_cp_ranks_equals_attention_of_the_whole_sequence(rank_pool, world_size, heads):
    for strided in (False, True):
        for errors in rank_pool(world_size).run(compare, heads=heads, strided=strided):
            assert max(errors) < 1e-12


def strided_inside(rank, world_size):
    """The gradient at the exchange itself is not contiguous: a product of transposed views."""
    mesh = Mesh.build(1, world_size)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 4, TOKENS, 6, generator=generator, dtype=torch.float64)
    pull = torch.randn(6, 2, TOKENS, 4, generator=generator, dtype=torch.float64)
    mine = slice(rank * TOKENS // world_size, (rank + 1) * TOKENS // world_size)
    part = x[:, :, mine].clone().requires_grad_()
    query, key, value = gather_sequence(part, part, part, mesh.cp_group)
    heads = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    ((query + key + value).permute(3, 0, 2, 1) * pull[..., heads]).sum().backward()
    return float((part.grad - 3 * pull.permute(1, 3, 2, 0)[:, :, mine]).abs().max())


def test_a_non_contiguous_gradient_is_exchanged_by_index(rank_pool):
    assert max(rank_pool(2).run(strided_inside)) < 1e-12


def refused(rank, world_size):
    with pytest.raises(ParallelError) as caught:
        gather_sequence(*(torch.zeros(1, 3, 2, 4) for _ in range(3)), Mesh.build(1, world_size).cp_group, what="Attn")
    with pytest.raises(ConfigError) as other:
        Mesh.build(1, 3)
    return str(caught.value), str(other.value)


def test_heads_and_ranks_that_do_not_divide_are_refused(rank_pool):
    for heads, ranks in rank_pool(2).run(refused):
        assert heads.startswith("parallel.cp = 2 does not divide the 3 query heads on a rank of Attn")
        assert "fix: set parallel.cp to one of [1, 3]" in heads
        assert ranks.startswith("parallel.cp = 3 x parallel.tp = 1 does not divide the number of ranks (2)")
        assert "fix: start a multiple of 3 ranks, or set parallel.cp to a divisor of 2" in ranks


def coordinates(rank, world_size):
    mesh = Mesh.build(1, 2)
    groups = [torch.distributed.get_process_group_ranks(g) for g in (mesh.cp_group, mesh.dp_group, mesh.zero_group)]
    both = Mesh.build(2, 2)
    more = [torch.distributed.get_process_group_ranks(g) for g in (both.tp_group, both.cp_group, both.zero_group)]
    alone = both.without_tp()
    assert (alone.tp_size, alone.cp_size, alone.cp_rank, alone.cp_group) == (1, 2, both.cp_rank, both.cp_group)
    assert (alone.dp_size, alone.zero_size) == (1, 2)
    assert (both.dp_size, both.zero_size, both.zero_rank) == (1, 2, rank // 2)
    assert both.get_data_parallel_world_size() == 2
    assert both.get_data_parallel_rank() == both.zero_rank
    assert both.get_data_parallel_group() is both.zero_group
    assert not [name for name in dir(both) if "sequence" in name]
    return (mesh.dp_rank, mesh.cp_rank, *groups), (both.cp_rank, both.tp_rank, *more)


def test_tp_is_fastest_then_cp_then_dp(rank_pool):
    found = rank_pool(4).run(coordinates)
    assert [one for one, _ in found] == [
        (0, 0, [0, 1], [0, 2], [0, 1, 2, 3]),
        (0, 1, [0, 1], [1, 3], [0, 1, 2, 3]),
        (1, 0, [2, 3], [0, 2], [0, 1, 2, 3]),
        (1, 1, [2, 3], [1, 3], [0, 1, 2, 3]),
    ]
    assert [two for _, two in found] == [
        (0, 0, [0, 1], [0, 2], [0, 2]),
        (0, 1, [0, 1], [1, 3], [1, 3]),
        (1, 0, [2, 3], [0, 2], [0, 2]),
        (1, 1, [2, 3], [1, 3], [1, 3]),
    ]
