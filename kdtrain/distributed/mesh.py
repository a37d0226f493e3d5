"""The mesh: the ranks of a world as dp x cp x tp, tp fastest, as a plain value.

tp ranks share one model and have the same tokens. cp ranks divide the sequences of a micro-batch: each holds S / cp
consecutive tokens of every sequence (`kdtrain.data.context`). dp ranks have different sequences. ZeRO shards equal
states and sums gradients of different tokens, so its group is the dp x cp ranks with the same tp_rank.

The mesh is also the `mpu` of a DeepSpeed engine, hence the long method names at the end. Do not add
`get_sequence_parallel_*` methods: DeepSpeed would silently rescale gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch.distributed as dist

from kdtrain.distributed.collectives import Group
from kdtrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes, this rank's coordinates and its process groups. Groups are None when there is no process group.

    Rank r has tp_rank = r % tp, cp_rank = r // tp % cp and dp_rank = r // (tp cp). Each group holds the ranks that
    differ in one coordinate only; zero_group those that differ in dp or cp.
    """

    world_size: int = 1
    rank: int = 0
    tp_size: int = 1
    tp_group: Group = None
    dp_group: Group = None
    world_group: Group = None
    cp_size: int = 1
    cp_group: Group = None
    zero_group: Group = None

    @classmethod
    def build(cls, tp_size: int = 1, cp_size: int = 1) -> Mesh:
        """The mesh of the initialised world (or of a single process). Every rank must call this, in the same order.

        Communicates: creates process groups. Raises ConfigError if tp_size x cp_size does not divide the world size.
        """
        started = dist.is_initialized()
        world_size, rank = (dist.get_world_size(), dist.get_rank()) if started else (1, 0)
        for name, size, product in (("tp", tp_size, tp_size), ("cp", cp_size, tp_size * cp_size)):
            if size < 1 or world_size % product:
                what = f"parallel.{name} = {size}" + (f" x parallel.tp = {tp_size}" if name == "cp" else "")
                raise ConfigError(
                    f"{what} does not divide the number of ranks ({world_size})\n  fix: start a multiple of "
                    f"{max(product, 1)} ranks, or set parallel.{name} to a divisor of {world_size * size // product}"
                )
        if not started:
            return cls()
        replica = tp_size * cp_size
        starts = range(0, world_size, replica)
        tp_group = own_group(range(first, first + tp_size) for first in range(0, world_size, tp_size))
        dp_group = own_group(range(offset, world_size, replica) for offset in range(replica))
        world = dist.group.WORLD
        if cp_size == 1:
            return cls(world_size, rank, tp_size, tp_group, dp_group, world, zero_group=dp_group)
        cp_group = own_group(range(i + offset, i + replica, tp_size) for i in starts for offset in range(tp_size))
        zero_group = own_group(range(offset, world_size, tp_size) for offset in range(tp_size))
        return cls(world_size, rank, tp_size, tp_group, dp_group, world, cp_size, cp_group, zero_group)

    def without_tp(self) -> Mesh:
        """The cp axis of this mesh only, for a model that every tp rank holds whole. Does not communicate."""
        return replace(
            self,
            world_size=self.cp_size,
            rank=self.cp_rank,
            tp_size=1,
            tp_group=None,
            dp_group=None,
            world_group=None,
            zero_group=None,
        )

    @property
    def tp_rank(self) -> int:
        """Index on the tensor-parallel axis."""
        return self.rank % self.tp_size

    @property
    def cp_rank(self) -> int:
        """Index on the context-parallel axis: which part of every sequence this rank holds."""
        return self.rank // self.tp_size % self.cp_size

    @property
    def dp_rank(self) -> int:
        """Index on the data-parallel axis: which sequences this rank has."""
        return self.rank // (self.tp_size * self.cp_size)

    @property
    def dp_size(self) -> int:
        """Number of ranks with different sequences."""
        return self.world_size // (self.tp_size * self.cp_size)

    @property
    def zero_rank(self) -> int:
        """Index among the ranks with different tokens: dp and cp as one axis."""
        return self.rank // self.tp_size

    @property
    def zero_size(self) -> int:
        """Number of ranks with different tokens, dp x cp: ZeRO shards and averages over them."""
        return self.world_size // self.tp_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes once per job."""
        return self.rank == 0

    # The methods that DeepSpeed calls on an mpu. The first six are used by every ZeRO stage and by checkpoints.
    def get_model_parallel_rank(self) -> int:
        """DeepSpeed: tp_rank."""
        return self.tp_rank

    def get_model_parallel_world_size(self) -> int:
        """DeepSpeed: tp_size."""
        return self.tp_size

    def get_model_parallel_group(self) -> Group:
        """DeepSpeed: tp_group."""
        return self.tp_group

    def get_data_parallel_rank(self) -> int:
        """DeepSpeed: zero_rank."""
        return self.zero_rank

    def get_data_parallel_world_size(self) -> int:
        """DeepSpeed: zero_size."""
        return self.zero_size

    def get_data_parallel_group(self) -> Group:
        """DeepSpeed: zero_group."""
        return self.zero_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def own_group(groups: Iterable[range]) -> Group:
    """Create a process group for each range of ranks and return the one that contains this rank.

    Communicates: every rank must call it with the same ranges, because `new_group` is collective over the world.
    """
    mine: Group = None
    for ranks in groups:
        group = dist.new_group(list(ranks))
        mine = group if dist.get_rank() in ranks else mine
    return mine
