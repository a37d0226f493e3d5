import pytest
import torch

from kdtrain.distributed.mesh import Mesh
from kdtrain.telemetry.metrics import Metrics

CPU = torch.device("cpu")


def reduce_over_dp(rank, world_size, tp):
    mesh = Mesh.build(tp)
    metrics = Metrics(device=CPU, group=mesh.dp_group)
    # replicated over tp, different per data rank, with unequal counts; the last data rank has none
    count = 0 if mesh.dp_rank == mesh.dp_size - 1 else 3 + 10 * mesh.dp_rank
    metrics.add("loss/ce", torch.tensor(2.0 * count + mesh.dp_rank * (count > 0)), count)
    metrics.add("loss/kd", torch.tensor(1.0), 1)
    metrics.add("loss/none", torch.tensor(0.0), 0)
    return metrics.reduce()


@pytest.mark.dist
@pytest.mark.parametrize("tp", [1, 2])
def test_unequal_counts_are_weighted_once_per_data_rank(rank_pool, tp):
    answers = rank_pool(4).run(reduce_over_dp, tp=tp)
    dp = 4 // tp
    counts = [3 + 10 * r for r in range(dp - 1)]
    expected = sum(2.0 * c + r for r, c in enumerate(counts)) / sum(counts)
    for answer in answers:
        assert answer["loss/ce"] == pytest.approx(expected, rel=1e-15)
        assert answer["loss/kd"] == 1.0
        assert answer["loss/none"] != answer["loss/none"]
    assert all(repr(answer) == repr(answers[0]) for answer in answers), "every rank reports the same bits"


def add_different_names(rank, world_size):
    mesh = Mesh.build(1)
    metrics = Metrics(device=CPU, group=mesh.dp_group)
    metrics.add("loss/ce", 1.0, 1)
    if rank == 1:
        metrics.add("loss/kd", 1.0, 1)
    try:
        metrics.reduce()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.dist
def test_different_metric_names_raise_on_all_ranks(rank_pool):
    answers = rank_pool(2).run(add_different_names)
    assert answers == ["data ranks added different metrics; not on every rank: loss/kd"] * 2


def save_and_go_on(rank, world_size):
    """(report of a run that saved and went on, report of one resumed from that state)."""
    mesh = Mesh.build(1)
    going, resumed = Metrics(device=CPU, group=mesh.dp_group), Metrics(device=CPU, group=mesh.dp_group)
    going.add("loss/ce", 0.1 * (rank + 1), 3 + rank)
    state = going.state()
    resumed.load_state(state)
    for metrics in (going, resumed):
        metrics.add("loss/ce", 0.7 / (rank + 3), 2)
    return state, going.reduce(), resumed.reduce()


def load_alone(rank, world_size, state):
    metrics = Metrics(device=CPU, group=Mesh.build(1).dp_group)
    metrics.load_state(state)
    return metrics.reduce()


@pytest.mark.dist
def test_saved_sums_resume_bitwise_in_any_layout(rank_pool):
    answers = rank_pool(2).run(save_and_go_on)
    (state, going, resumed), other = answers[0], answers[1]
    assert going == resumed
    assert (state, going, resumed) == other
    assert state["loss/ce"] == [pytest.approx(0.3), 7.0]
    for answer in rank_pool(4).run(load_alone, state=state):
        assert answer["loss/ce"] == pytest.approx(0.3 / 7, rel=1e-15)
