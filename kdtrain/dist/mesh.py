"""The mesh: one world of ranks as dp x tp, tp fastest, as a plain value.

It is also the `mpu` that a DeepSpeed engine is given, hence the long method names at the end. It must never grow
`get_sequence_parallel_*` methods: DeepSpeed would silently rescale gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from kdtrain.dist.collectives import Group
from kdtrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes, this rank's coordinates and its process groups. Groups are None when there is no process group.

    Rank r has tp_rank = r % tp_size and dp_rank = r // tp_size.
    """

    world_size: int = 1
    rank: int = 0
    tp_size: int = 1
    tp_group: Group = None
    dp_group: Group = None
    world_group: Group = None

    @classmethod
    def build(cls, tp_size: int = 1) -> Mesh:
        """The mesh of the initialised world (or of a single process). Every rank must call this, in the same order.

        Communicates: creates process groups. Raises ConfigError if tp_size does not divide the world size.
        """
        if not dist.is_initialized():
            world_size, rank = 1, 0
        else:
            world_size, rank = dist.get_world_size(), dist.get_rank()
        if tp_size < 1 or world_size % tp_size:
            raise ConfigError(
                f"parallel.tp = {tp_size} does not divide the number of ranks ({world_size})\n"
                f"  fix: start a multiple of {max(tp_size, 1)} ranks, or set parallel.tp to a divisor of {world_size}"
            )
        if not dist.is_initialized():
            return cls()
        tp_group = dp_group = None
        for first in range(0, world_size, tp_size):
            ranks = list(range(first, first + tp_size))
            group = dist.new_group(ranks)
            tp_group = group if rank in ranks else tp_group
        for place in range(tp_size):
            ranks = list(range(place, world_size, tp_size))
            group = dist.new_group(ranks)
            dp_group = group if rank in ranks else dp_group
        return cls(world_size, rank, tp_size, tp_group, dp_group, dist.group.WORLD)

    @property
    def tp_rank(self) -> int:
        """Place on the tensor-parallel axis."""
        return self.rank % self.tp_size

    @property
    def dp_rank(self) -> int:
        """Place on the data-parallel axis."""
        return self.rank // self.tp_size

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.world_size // self.tp_size

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes what only one rank may write."""
        return self.rank == 0

    # The names DeepSpeed calls on an mpu. The first six are used by every ZeRO stage and by checkpoints.
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
        """DeepSpeed: dp_rank."""
        return self.dp_rank

    def get_data_parallel_world_size(self) -> int:
        """DeepSpeed: dp_size."""
        return self.dp_size

    def get_data_parallel_group(self) -> Group:
        """DeepSpeed: dp_group."""
        return self.dp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
