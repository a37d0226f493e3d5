"""Numbers of few bits, packed without gaps: fixed widths, and exponential Golomb codes for skewed ones.

Every part begins at a byte, and bits are in ascending order (the first one of a byte is its lowest). The bytes depend
on the numbers alone, not on the version of a library. Reading and writing are vectorised; nothing loops over numbers.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import DTypeLike

Array = np.ndarray
MAX_BITS = 32
"""Widest number that can be packed."""
_GOLOMB = struct.Struct("<BI")
_MASKS = (np.uint64(1) << np.arange(MAX_BITS + 1, dtype=np.uint64)) - np.uint64(1)


def bit_length(values: Array) -> Array:
    """Bits of whole numbers in [0, 2^53), 0 for 0."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def pack_fixed(values: Array) -> bytes:
    """Numbers in [0, 2^32): one byte with the width of the largest, then all of them in this width."""
    width = int(values.max(initial=0)).bit_length()
    return bytes([width]) + _pack(values, np.full(len(values), width, dtype=np.int64))


def pack_golomb(values: Array) -> bytes:
    """Numbers in [0, 2^31) by an exponential Golomb code, of the order k that takes the fewest bits.

    With x = value + 2^k of L + 1 bits: L - k zeros and a one, in a part of their own, then the lower L bits of x. The
    first 5 bytes are k and the size of the first part.
    """
    orders = range(int(values.max(initial=0)).bit_length() + 1)
    order = min(orders, key=lambda k: int(2 * bit_length(values + (1 << k)).sum()) - k * len(values))
    shifted = values.astype(np.int64) + (1 << order)
    widths = bit_length(shifted) - 1
    ends = np.cumsum(widths - order + 1)
    ones = np.zeros(ends[-1] if len(ends) else 0, dtype=np.uint8)
    ones[ends - 1] = 1
    prefixes = np.packbits(ones, bitorder="little").tobytes()
    return _GOLOMB.pack(order, len(prefixes)) + prefixes + _pack(shifted - (1 << widths), widths)


def _pack(values: Array, widths: Array) -> bytes:
    """`values`, each less than 2^width, one after the other. Distinct bits add up, so sums in float64 are exact."""
    ends = np.cumsum(widths)
    bits = int(ends[-1]) if len(ends) else 0
    starts = ends - widths
    words, shifted = starts >> 5, values.astype(np.uint64) << (starts & 31).astype(np.uint64)
    low, high = (shifted & np.uint64(0xFFFFFFFF)).astype(np.float64), (shifted >> np.uint64(32)).astype(np.float64)
    count = bits // 32 + 2
    total = np.bincount(words, weights=low, minlength=count) + np.bincount(words + 1, weights=high, minlength=count)
    return total.astype("<u4").tobytes()[: (bits + 7) // 8]


class Reader:
    """Reads the parts of a record in the order in which they were written. ValueError if it ends before a part does."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._size = data + bytes(12 - len(data) % 4), 0, len(data)
        words = np.frombuffer(self._data, dtype="<u4").astype(np.uint64)
        self._pairs = words[:-1] | (words[1:] << np.uint64(32))  # 64 bits from each multiple of 32 on

    def array(self, dtype: DTypeLike, count: int) -> Array:
        """`count` numbers of a dtype, little-endian; a view."""
        kind = np.dtype(dtype).newbyteorder("<")
        return np.frombuffer(self._data, dtype=kind, count=count, offset=self._take(count * kind.itemsize))

    def fixed(self, count: int) -> Array:
        """`count` numbers of `pack_fixed`, int64."""
        width = int(self.array(np.uint8, 1)[0])
        return self._fields(np.arange(count) * width, np.array(width), count * width)

    def golomb(self, count: int) -> Array:
        """`count` numbers of `pack_golomb`, int64."""
        order, size = _GOLOMB.unpack_from(self._data, self._take(_GOLOMB.size))
        start = self._take(size)
        prefixes = np.frombuffer(self._data, dtype=np.uint8, count=size, offset=start)
        ones = np.flatnonzero(np.unpackbits(prefixes, bitorder="little").view(bool))
        if len(ones) != count or order > MAX_BITS:
            raise ValueError(f"{len(ones)} numbers of order {order} where {count} are expected")
        widths = np.diff(ones, prepend=-1) + (order - 1)
        ends = np.cumsum(widths)
        rest = self._fields(ends - widths, widths, int(ends[-1]) if count else 0)
        return rest + (1 << widths) - (1 << order)

    def end(self) -> None:
        """Raise ValueError unless everything was read."""
        if self._at != self._size:
            raise ValueError(f"{self._size - self._at} bytes follow the last part")

    def _fields(self, starts: Array, widths: Array, bits: int) -> Array:
        at = self._take((bits + 7) // 8)
        if np.max(widths, initial=0) > MAX_BITS:
            raise ValueError(f"a number of {np.max(widths)} bits")
        starts = starts + 8 * at
        found = self._pairs.take(starts >> 5)
        found >>= (starts & 31).astype(np.uint64)
        found &= _MASKS.take(widths)
        return found.view(np.int64)

    def _take(self, size: int) -> int:
        start, self._at = self._at, self._at + size
        if self._at > self._size:
            raise ValueError(f"it ends at byte {self._size}, before a part that ends at byte {self._at}")
        return start
