"""Counter-based random numbers: as documented, uniform and uncorrelated."""

import math
import re

import pytest
import torch
from kdtrain_kernels.counter import GOLDEN, mix64, uniform


def reference_uniform(seed, sample_id, position, draw):
    """The documented construction in Python's own integers."""
    mask = (1 << 64) - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    state = mix((seed + golden) & mask)
    for word in (sample_id, position, draw):
        state = mix(((state ^ (word & mask)) + golden) & mask)
    return (state >> 11) / 2**53


def test_the_counter_is_splitmix64_as_documented():
    # the first output of SplitMix64 seeded with 1234567, as published with the algorithm
    assert int(mix64(torch.tensor(1234567) + GOLDEN)) == 6457827717110365317
    names = [(0, 0), (1, 0), (0, 1), (2**62, 2**40), (-1, 5), (123456789, 4095)]
    ids, positions = torch.tensor(names).T
    for seed in (0, 1, 2**63 - 1):
        for draw in (0, 3):
            expected = [reference_uniform(seed, *name, draw) for name in names]
            assert uniform(seed, ids, positions, draw).tolist() == expected


def test_counter_numbers_are_uniform_and_uncorrelated_with_their_neighbours():
    ids = torch.arange(1000)[:, None].expand(-1, 100).flatten()
    positions = torch.arange(100).repeat(1000)
    u = uniform(3, ids, positions)
    assert u.unique().numel() == 100000
    assert u.min() >= 0
    assert u.max() < 1
    # chi-squared of 256 equal bins: mean 255, standard deviation 22.6
    counts = torch.histc(u, 256, 0.0, 1.0)
    assert float(((counts - 390.625) ** 2 / 390.625).sum()) < 255 + 5 * 22.6
    grid = u.view(1000, 100) - 0.5
    others = uniform(4, ids, positions).view(1000, 100) - 0.5, uniform(3, ids, positions, 1).view(1000, 100) - 0.5
    pairs = [(grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), *((grid, other) for other in others)]
    for a, b in pairs:
        correlation = float((a * b).mean() * 12)
        assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_the_counter_refuses_a_seed_of_more_than_63_bits():
    zero = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=re.escape("seed = -1, need an integer in [0, 2^63)")):
        uniform(-1, zero, zero)
