"""The order of sequences: a bijection per epoch, shares of every store, draws that can be predicted."""

import numpy as np
import pytest

from kdtrain.data import order
from kdtrain.data.order import BLOCK, BlendOrder, permute, schedule
from kdtrain.errors import DataError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 255, 256, 257, 1000])
def test_permute_is_a_bijection_that_moves_with_every_key(size):
    for keys in ((0,), (1, 2, 3), (-5, 1 << 70)):
        assert sorted(permute(np.arange(size), size, *keys).tolist()) == list(range(size))
    if size > 100:
        orders = {tuple(permute(np.arange(size), size, *keys)) for keys in ((0,), (1,), (0, 0), (0, 1), (1, 0))}
        assert len(orders) == 5


def test_permute_of_one_index_equals_permute_of_array():
    row = permute(np.arange(1000), 1000, 3, 1)
    assert [int(permute(i, 1000, 3, 1)[0]) for i in range(0, 1000, 37)] == row[::37].tolist()


def test_permutation_separates_neighbours():
    row = permute(np.arange(4096), 4096, 5).astype(np.float64)
    # correlation of 4096 independent pairs: standard deviation 1/64; 5 of them
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(row[:-lag], row[lag:])[0, 1]) < 5 / 64
    assert abs(np.corrcoef(row, np.arange(4096))[0, 1]) < 5 / 64
    assert len(set(np.diff(row).tolist())) > 2000


@pytest.mark.parametrize("counts", [[1], [3, 1], [1, 1, 1], [700, 200, 100], [1, 997, 2, 13, 41]])
def test_every_prefix_of_schedule_holds_shares(counts):
    stores, rank = schedule(np.array(counts))
    total = sum(counts)
    for store, count in enumerate(counts):
        drawn = np.cumsum(stores == store)
        due = np.arange(1, total + 1) * count / total
        assert np.abs(drawn - due).max() <= 1 + len(counts) / 2
        assert rank[stores == store].tolist() == list(range(count))


def test_an_epoch_visits_every_sequence_once_and_the_next_one_in_another_order():
    blend = BlendOrder([37], None, seed=3)
    first, second = ([blend[37 * e + i] for i in range(37)] for e in (0, 1))
    assert sorted(first) == sorted(second) == [(0, k) for k in range(37)]
    assert first != second
    assert first != [BlendOrder([37], None, seed=4)[i] for i in range(37)]


def test_stores_of_blend_have_separate_epochs():
    blend = BlendOrder([11, 5], [3.0, 1.0], seed=3)
    drawn = [blend[i] for i in range(4 * 40)]
    for store, size in enumerate((11, 5)):
        mine = [k for s, k in drawn if s == store]
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert sum(s == 0 for s, _ in drawn) == 120


def test_shares_and_epochs_hold_across_the_schedules_repetition():
    sizes, weights = [10**6, 10**5], [2.0, 1.0]
    blend = BlendOrder(sizes, weights, seed=3)
    around = [blend[i] for i in range(BLOCK - 300, BLOCK + 300)]
    assert len(set(around)) == 600
    assert abs(sum(s == 0 for s, _ in around) - 400) <= 4


@pytest.mark.parametrize("sizes", [(1000, 77), (60_000, 40_000)])
def test_over_three_schedules_every_store_completes_epochs(sizes, monkeypatch):
    # 3 BLOCK permutations one by one would take 20 s; they are bijections (above), so their arguments suffice
    calls = []
    monkeypatch.setattr(
        order, "permute", lambda index, size, seed, store, epoch: calls.append((store, size, epoch, index)) or [index]
    )
    blend = BlendOrder(sizes, [3.0, 1.0], seed=3)
    drawn = [blend[i] for i in range(3 * BLOCK)]
    assert drawn == [(store, index) for store, _, _, index in calls]
    for store, size in enumerate(sizes):
        mine = [(epoch, index) for s, n, epoch, index in calls if s == store and n == size]
        assert mine == [divmod(place, size) for place in range(len(mine))]
        assert len(mine) == 3 * BLOCK * (3, 1)[store] // 4


def test_over_three_short_schedules_no_sequence_is_skipped_or_repeated(monkeypatch):
    monkeypatch.setattr(order, "BLOCK", 64)
    sizes = (37, 11)
    blend = BlendOrder(sizes, [2.0, 1.0], seed=3)
    drawn = [blend[i] for i in range(3 * 64)]
    for store, size in enumerate(sizes):
        mine = [k for s, k in drawn if s == store]
        assert len(mine) > 3 * size
        for start in range(0, len(mine), size):
            epoch = mine[start : start + size]
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) < size or sorted(epoch) == list(range(size))


@pytest.mark.parametrize(("sizes", "weights"), [((7, 30, 2), None), ((7, 30, 2), (1.0, 0.2, 3.0)), ((5,), None)])
def test_predicted_draws_equal_actual_draws(sizes, weights, monkeypatch):
    monkeypatch.setattr(order, "BLOCK", 101)  # so that a few hundred draws are several schedules
    blend = BlendOrder(sizes, weights, seed=3)
    for total in (0, 1, 100, 101, 102, 517):
        counted = [0] * len(sizes)
        for position in range(total):
            counted[blend[position][0]] += 1
        assert blend.draws(total) == counted
    assert blend.sizes == list(sizes)


def test_weights_near_the_largest_number_are_shares_like_any_other():
    small, large = (BlendOrder([50, 7], weights, seed=5) for weights in ([3.0, 1.0], [1.5e308, 0.5e308]))
    assert [large[i] for i in range(300)] == [small[i] for i in range(300)]
    even = BlendOrder([50, 7], [1e308, 1e308], seed=5)
    assert sum(even[i][0] for i in range(400)) == 200
    with pytest.raises(DataError, match=r"(?s)data.train\[1\] has a share of 0\.00e\+00.*would never be drawn"):
        BlendOrder([50, 7], [1e308, 1e-308], seed=5)


def test_without_weights_the_share_of_a_store_is_its_size():
    blend = BlendOrder([300, 100], None, seed=1)
    drawn = [blend[i] for i in range(400)]
    assert abs(sum(s == 0 for s, _ in drawn) - 300) <= 2


def test_far_positions_take_constant_time_and_are_in_range():
    blend = BlendOrder([10**9, 3], [1.0, 1e-3], seed=1)
    for position in (10**12, 2**45 + 1):
        store, sequence = blend[position]
        assert 0 <= sequence < (10**9, 3)[store]
    with pytest.raises(IndexError):
        blend[-1]


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([5, 0], None, r"data.train\[1\] has no complete sequence"),
        ([5, 5], [1.0], "do not fit 2 stores"),
        ([5, 5], [1.0, 0.0], "one positive weight"),
        ([5, 5], [1.0, float("nan")], "one positive weight"),
        ([5, 5], [1.0, 1e-9], "would never be drawn"),
    ],
)
def test_a_blend_that_cannot_be_drawn_is_refused(sizes, weights, message):
    with pytest.raises(DataError, match=message):
        BlendOrder(sizes, weights, seed=1)
