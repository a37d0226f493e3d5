"""A vocabulary that is cut over a group of ranks, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from kdtrain.distributed.collectives import Group, group_rank, group_size
from kdtrain.distributed.vocab import VocabShard


@dataclass(frozen=True, slots=True)
class VocabGroup:
    """This rank's shard of a vocabulary, and the group whose ranks hold the other shards; None for one rank.

    Raises ValueError unless the vocabulary is sharded over exactly this group. Does not communicate.
    """

    shard: VocabShard
    group: Group

    def __post_init__(self) -> None:
        size, rank, shard = group_size(self.group), group_rank(self.group), self.shard
        if (shard.tp_size, shard.tp_rank) != (size, rank):
            raise ValueError(
                f"shard is slice {shard.tp_rank} of {shard.tp_size}, but this is rank {rank} of a group of {size}; "
                "give the group that the vocabulary is cut over, and VocabShard.of(vocab_size, rank, size)"
            )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return group_size(self.group)

    @property
    def rank(self) -> int:
        """This rank's index in the group."""
        return group_rank(self.group)
