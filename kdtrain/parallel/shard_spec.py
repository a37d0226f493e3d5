"""How one full parameter is sharded over the tensor-parallel ranks: arithmetic only, without ranks and torch.

The same value shards a live module, selects the slices to read from safetensors, merges state dicts and describes
checkpoint slices, so a layout is defined in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[int, int]
"""(start, stop) along the sharded dim of the full parameter."""


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """A parameter divided along `dim` into one shard per tensor-parallel rank.

    shards[r] = (start, stop) in full coordinates along `dim` (may be empty: start == stop); together the shards cover
    [0, full size). Ranks may hold the same shard (key/value heads, when there are fewer than ranks), but shards do not
    overlap otherwise. `padded` is the local size along `dim` when every rank pads its shard with zeros at the end to
    one common size (vocabularies), else None.

    segments: for fused parameters (query, key and value in one), where each rank holds several ranges: segments[r] are
    the ranges of rank r, in the order of its local rows, and `shards` is empty. Code for both cases uses `ranges`.
    """

    dim: int
    shards: tuple[Range, ...]
    padded: int | None = None
    segments: tuple[tuple[Range, ...], ...] = ()

    @property
    def tp_size(self) -> int:
        """Number of ranks the parameter is sharded over."""
        return len(self.segments or self.shards)

    @property
    def full_size(self) -> int:
        """Unpadded size of the full parameter along `dim`."""
        return max(stop for rank in range(self.tp_size) for _, stop in self.ranges(rank))

    @property
    def shared(self) -> bool:
        """Whether two ranks hold the same, non-empty shard."""
        return any(self.is_replica(rank) for rank in range(self.tp_size))

    @property
    def in_order(self) -> bool:
        """Whether the shards, concatenated in rank order, are the full parameter along `dim`."""
        return not self.segments and not self.shared

    def ranges(self, tp_rank: int) -> tuple[Range, ...]:
        """This rank's ranges in full coordinates along `dim`, in the order of its local rows."""
        return self.segments[tp_rank] if self.segments else (self.shards[tp_rank],)

    def is_replica(self, tp_rank: int) -> bool:
        """Whether a lower rank holds the same shard; only the lowest one writes it and counts it in norms."""
        mine = self.ranges(tp_rank)
        return self.held_size(tp_rank) > 0 and any(self.ranges(rank) == mine for rank in range(tp_rank))

    def held_size(self, tp_rank: int) -> int:
        """Size of this rank's shard along `dim`, without padding."""
        return sum(stop - start for start, stop in self.ranges(tp_rank))

    def full_shape(self, local_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the full, unpadded parameter, from a rank's local shape."""
        return (*local_shape[: self.dim], self.full_size, *local_shape[self.dim + 1 :])

    def check(self, size: int) -> None:
        """Raises ValueError unless the ranges of all ranks, without replicas, cover [0, size) exactly once."""
        found = [r for rank in range(self.tp_size) if not self.is_replica(rank) for r in self.ranges(rank)]
        at = 0
        for start, stop in sorted(found):
            if start != at or stop < start:
                raise ValueError(f"ranges {found} do not partition dim {self.dim}: gap or overlap at {min(start, at)}")
            at = stop
        if at != size:
            raise ValueError(f"ranges {found} do not partition dim {self.dim} of size {size}")


def even_spec(dim: int, size: int, tp_size: int, unit: int = 1) -> ShardSpec:
    """Divide `size` along `dim` at multiples of `unit`, as evenly as possible; earlier ranks get the extra units.

    size, unit: elements along `dim`. Raises ValueError when `unit` does not divide `size`.
    """
    if unit < 1 or size % unit:
        raise ValueError(f"cannot divide {size} at multiples of {unit}")
    base, extra = divmod(size // unit, tp_size)
    shards, start = [], 0
    for rank in range(tp_size):
        stop = start + unit * (base + (rank < extra))
        shards.append((start, stop))
        start = stop
    return ShardSpec(dim, tuple(shards))


def padded_spec(dim: int, size: int, tp_size: int, rows: int) -> ShardSpec:
    """Divide `size` into consecutive shards of `rows`, the last ones short or empty, each padded to `rows`.

    Raises ValueError when `tp_size * rows < size`.
    """
    if tp_size * rows < size:
        raise ValueError(f"{tp_size} shards of {rows} rows cannot hold {size}")
    shards = tuple((min(r * rows, size), min((r + 1) * rows, size)) for r in range(tp_size))
    return ShardSpec(dim, shards, padded=rows)


def fused_spec(parts: Sequence[ShardSpec]) -> ShardSpec:
    """The spec of several parameters stacked along their dim: every rank holds its shard of each, in the same order.

    Raises ValueError for parts of different dims or numbers of ranks, for padded parts, and for parts with replicas:
    a shard could then be partly a replica.
    """
    first = parts[0]
    if any((part.dim, part.tp_size, part.padded) != (first.dim, first.tp_size, None) for part in parts):
        raise ValueError(f"cannot stack specs of different dims or numbers of ranks, or padded ones: {parts}")
    if any(part.shared for part in parts):
        raise ValueError("cannot stack specs with replicas")
    offsets = [sum(part.full_size for part in parts[:index]) for index in range(len(parts))]
    segments = tuple(
        tuple(
            (offset + start, offset + stop)
            for part, offset in zip(parts, offsets, strict=True)
            for start, stop in part.ranges(rank)
        )
        for rank in range(first.tp_size)
    )
    return ShardSpec(first.dim, (), segments=segments)
