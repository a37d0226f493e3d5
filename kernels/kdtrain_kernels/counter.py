"""Counter-based random numbers: a pure function of their keys, without state or order, the same on every device.

The mixing step is that of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014; the
constants are Stafford's variant 13). int64 tensors hold the unsigned 64-bit words: sums and products wrap around.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    return word - (1 << 64) if word >> 63 else word


GOLDEN = _signed(0x9E3779B97F4A7C15)
"""SplitMix64's increment."""
_MULTIPLIERS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
MAX_SEED = (1 << 63) - 1


def mix64(words: Tensor) -> Tensor:
    """SplitMix64's output function, a bijection of 64-bit words. int64 [...] -> int64 [...]."""
    words = (words ^ _shift_right(words, 30)) * _MULTIPLIERS[0]
    words = (words ^ _shift_right(words, 27)) * _MULTIPLIERS[1]
    return words ^ _shift_right(words, 31)


def uniform(seed: int, sample_ids: Tensor, positions: Tensor, draw: int = 0) -> Tensor:
    """[T] float64 in [0, 1), a multiple of 2^-53, determined by (seed, sample_ids[t], positions[t], draw) alone.

    sample_ids, positions: [T] int64, any values. Starting from mix64(seed + GOLDEN), each of the three words w takes
    the state h to mix64((h ^ w) + GOLDEN), which is a bijection in each word; the result is the upper 53 bits. Raises
    ValueError for a seed outside [0, 2^63).
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed = {seed}, need an integer in [0, 2^63)")
    state = mix64(torch.full((), seed, dtype=torch.int64, device=sample_ids.device) + GOLDEN)
    for word in (sample_ids, positions, torch.full_like(positions, draw)):
        state = mix64((state ^ word) + GOLDEN)
    return _shift_right(state, 11).double() * 2.0**-53


def _shift_right(words: Tensor, bits: int) -> Tensor:
    """A logical shift, which fills with zeros from the left."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
