"""How one full parameter is laid over the tensor-parallel ranks: pure arithmetic, no rank, no torch.

The same value cuts a live module, tells the reader which slices to fetch from safetensors, merges a state dict,
and labels checkpoint slices; so a layout exists in one place only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cut:
    """A parameter cut along `dim` into one contiguous piece per tensor-parallel rank.

    pieces[r] = (start, stop) in full coordinates along `dim` (may be empty: start == stop); the pieces partition
    [0, full size). `padded` is the local size along `dim` when every rank pads its piece with zeros at the end to
    one common size (vocabularies), else None.
    """

    dim: int
    pieces: tuple[tuple[int, int], ...]
    padded: int | None = None

    @property
    def tp_size(self) -> int:
        """Number of ranks the parameter is cut over."""
        return len(self.pieces)

    @property
    def full_size(self) -> int:
        """Unpadded size of the full parameter along `dim`."""
        return self.pieces[-1][1]

    def local_size(self, tp_rank: int) -> int:
        """Size along `dim` of this rank's tensor, padding included."""
        start, stop = self.pieces[tp_rank]
        return stop - start if self.padded is None else self.padded

    def full_shape(self, local_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the full, unpadded parameter, from a rank's local shape."""
        return (*local_shape[: self.dim], self.full_size, *local_shape[self.dim + 1 :])


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
