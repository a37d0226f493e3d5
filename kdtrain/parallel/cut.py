"""How one full parameter is laid over the tensor-parallel ranks: pure arithmetic, no rank, no torch.

The same value cuts a live module, tells the reader which slices to fetch from safetensors, merges a state dict,
and labels checkpoint slices; so a layout exists in one place only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[int, int]
"""(start, stop) along the cut dim of the full parameter."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A parameter cut along `dim` into one piece per tensor-parallel rank.

    pieces[r] = (start, stop) in full coordinates along `dim` (may be empty: start == stop); together the pieces cover
    [0, full size). Ranks may hold the same piece (key/value heads, when there are fewer than ranks), but pieces never
    overlap otherwise. `padded` is the local size along `dim` when every rank pads its piece with zeros at the end to
    one common size (vocabularies), else None.

    segments: for fused parameters (query, key and value in one), whose ranks hold several ranges one behind the other:
    segments[r] are the ranges of rank r, in the order in which it holds them, and `pieces` is empty. Code that can do
    both asks `ranges`.
    """

    dim: int
    pieces: tuple[Range, ...]
    padded: int | None = None
    segments: tuple[tuple[Range, ...], ...] = ()

    @property
    def tp_size(self) -> int:
        """Number of ranks the parameter is cut over."""
        return len(self.segments or self.pieces)

    @property
    def full_size(self) -> int:
        """Unpadded size of the full parameter along `dim`."""
        return max(stop for rank in range(self.tp_size) for _, stop in self.ranges(rank))

    @property
    def shared(self) -> bool:
        """Whether some rank holds the same piece as another, which holds more than nothing."""
        return any(self.is_copy(rank) for rank in range(self.tp_size))

    @property
    def in_order(self) -> bool:
        """Whether the pieces, one behind the other in rank order, are the full parameter along `dim`."""
        return not self.segments and not self.shared

    def ranges(self, tp_rank: int) -> tuple[Range, ...]:
        """What this rank holds, in full coordinates along `dim`, in the order in which it holds it."""
        return self.segments[tp_rank] if self.segments else (self.pieces[tp_rank],)

    def is_copy(self, tp_rank: int) -> bool:
        """Whether a lower rank holds the same: then that one writes it and counts it in norms, this one does not."""
        mine = self.ranges(tp_rank)
        return self.held_size(tp_rank) > 0 and any(self.ranges(rank) == mine for rank in range(tp_rank))

    def held_size(self, tp_rank: int) -> int:
        """Size along `dim` of what this rank holds, padding left out."""
        return sum(stop - start for start, stop in self.ranges(tp_rank))

    def full_shape(self, local_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the full, unpadded parameter, from a rank's local shape."""
        return (*local_shape[: self.dim], self.full_size, *local_shape[self.dim + 1 :])

    def check(self, size: int) -> None:
        """Raises ValueError unless the ranks' ranges, those of copies once, cover [0, size) exactly once."""
        found = [r for rank in range(self.tp_size) if not self.is_copy(rank) for r in self.ranges(rank)]
        at = 0
        for start, stop in sorted(found):
            if start != at or stop < start:
                raise ValueError(f"ranges {found} do not partition dim {self.dim}: gap or overlap at {min(start, at)}")
            at = stop
        if at != size:
            raise ValueError(f"ranges {found} do not partition dim {self.dim} of size {size}")


def even_cut(dim: int, size: int, tp_size: int, unit: int = 1) -> Cut:
    """Cut `size` along `dim` at multiples of `unit`, as evenly as possible; earlier ranks get the extra units.

    Raises ValueError when `unit` does not divide `size`.
    """
    if unit < 1 or size % unit:
        raise ValueError(f"cannot cut {size} at multiples of {unit}")
    base, extra = divmod(size // unit, tp_size)
    pieces, start = [], 0
    for rank in range(tp_size):
        stop = start + unit * (base + (rank < extra))
        pieces.append((start, stop))
        start = stop
    return Cut(dim, tuple(pieces))


def padded_cut(dim: int, size: int, tp_size: int, rows: int) -> Cut:
    """Cut `size` into consecutive pieces of `rows`, the last ones short or empty, each padded to `rows`.

    Raises ValueError when `tp_size * rows < size`.
    """
    if tp_size * rows < size:
        raise ValueError(f"{tp_size} pieces of {rows} do not hold {size}")
    pieces = tuple((min(r * rows, size), min((r + 1) * rows, size)) for r in range(tp_size))
    return Cut(dim, pieces, padded=rows)


def fused_cut(parts: Sequence[Cut]) -> Cut:
    """Of parameters stacked along their dim, each cut on its own: every rank holds its piece of each, stacked alike.

    Raises ValueError for parts of different dims or numbers of ranks, for padded parts, and when only some of the
    parts are shared between ranks: such a piece would be partly a copy.
    """
    first = parts[0]
    if any((part.dim, part.tp_size, part.padded) != (first.dim, first.tp_size, None) for part in parts):
        raise ValueError(f"cannot stack cuts of different dims or numbers of ranks, or padded ones: {parts}")
    if any(part.shared for part in parts):
        raise ValueError("cannot stack cuts that ranks share")
    offsets = [sum(part.full_size for part in parts[:index]) for index in range(len(parts))]
    segments = tuple(
        tuple(
            (offset + start, offset + stop)
            for part, offset in zip(parts, offsets, strict=True)
            for start, stop in part.ranges(rank)
        )
        for rank in range(first.tp_size)
    )
    return Cut(first.dim, (), segments=segments)
