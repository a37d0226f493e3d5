"""Collectives transfer every dtype bit for bit, or refuse it on all ranks before any of them waits."""

import pytest
import torch
import torch.distributed as dist

from kdtrain.distributed.collectives import (
    broadcast_first_,
    exchange_ranks,
    gather_ranks,
    reduce_sum_,
    scatter_tokens,
    start_gather,
)

pytestmark = pytest.mark.dist

CARRIED = ["float16", "bfloat16", "float32", "float64", "int8", "uint8", "int32", "int64"]
OTHERS = [
    *("int16", "uint16", "uint32", "uint64", "bool", "complex64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
]


def sample(dtype, rank, shape):
    """Random bits, different on each rank; for bool random 0 and 1."""
    generator = torch.Generator().manual_seed(rank)
    kind = getattr(torch, dtype)
    if kind == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    size = torch.empty((), dtype=kind).element_size()
    count = torch.Size(shape).numel() * size
    return torch.randint(256, (count,), generator=generator, dtype=torch.uint8).view(kind).view(shape)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def transferred(rank, world_size, dtype):
    group, shape = dist.group.WORLD, (world_size, 3, 5)
    mine, all_of_them = sample(dtype, rank, shape), [sample(dtype, r, shape) for r in range(world_size)]
    for gathered in (gather_ranks(mine, group), start_gather(mine.transpose(1, 2), group)().transpose(2, 3)):
        assert gathered.dtype == mine.dtype
        assert bits(gathered) == bits(torch.stack(all_of_them))
    scalar = gather_ranks(mine[0, 0, 0], group)
    assert bits(scalar) == bits(torch.stack([other[0, 0, 0] for other in all_of_them]))
    assert gather_ranks(mine[:, :0], group).shape == (world_size, world_size, 0, 5)
    exchanged = exchange_ranks(mine, group)
    assert bits(exchanged) == bits(torch.stack([other[rank] for other in all_of_them]))
    copy = mine.clone()
    assert broadcast_first_(copy, group) is copy
    assert bits(copy) == bits(all_of_them[0])


def summed(rank, world_size, dtype):
    group, kind = dist.group.WORLD, getattr(torch, dtype)
    if dtype in CARRIED:
        assert reduce_sum_(torch.full((3,), rank + 1, dtype=kind), group).tolist() == [3, 3, 3]
        return
    refused = torch.zeros(3, dtype=torch.uint8).to(kind) if kind != torch.float8_e8m0fnu else sample(dtype, 0, (3,))
    for attempt in (
        lambda: reduce_sum_(refused, group),
        lambda: scatter_tokens(refused.repeat(2)[None, :, None], group),
    ):
        try:
            attempt()
        except ValueError as error:
            assert f"cannot sum torch.{dtype}: gloo and NCCL add torch.bfloat16, " in str(error)  # noqa: PT017
        else:
            raise AssertionError("not refused")


@pytest.mark.parametrize("dtype", [*CARRIED, *OTHERS])
def test_gather_exchange_and_broadcast_keep_every_bit_of_every_dtype(rank_pool, dtype):
    rank_pool(2).run(transferred, dtype=dtype)


@pytest.mark.parametrize("dtype", [*CARRIED, *OTHERS])
def test_a_sum_is_exact_or_refused_on_every_rank(rank_pool, dtype):
    rank_pool(2).run(summed, dtype=dtype)


def gather_by_backend(rank, world_size, dtype):
    """The error of the backend's own gather of this dtype, or None."""
    mine = sample(dtype, rank, (4,))
    try:
        dist.all_gather([torch.empty_like(mine) for _ in range(world_size)], mine)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def test_the_backend_refuses_dtypes_that_are_transferred_as_bytes(rank_pool):
    for dtype in ("int16", "uint16", "uint32", "float8_e4m3fn"):
        assert all(rank_pool(2).run(gather_by_backend, dtype=dtype)), f"the backend gathers {dtype} now"
