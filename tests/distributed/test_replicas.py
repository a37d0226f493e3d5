"""check_replicas detects tp ranks with different tokens and cp ranks with parts of different sequences."""

import pytest
import torch

from kdtrain.batch import Batch
from kdtrain.data.context import cut_sequences
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ParallelError
from kdtrain.training.replicas import check_replicas

pytestmark = pytest.mark.dist


def compare(rank, world_size, differs):
    ids = torch.arange(12).reshape(2, 6)
    batch = Batch(ids, ids + 1, torch.ones(2, 6), ids % 6, torch.tensor([3, 4]))
    odd = Batch(ids, ids + 1 + (rank == 1) * differs, batch.loss_mask, batch.position_ids, batch.sample_ids)
    try:
        check_replicas([batch, odd], Mesh.build(world_size))
    except ParallelError as error:
        return str(error)
    return None


def test_tp_rank_with_different_labels_is_reported_on_every_rank(rank_pool):
    for message in rank_pool(2).run(compare, differs=1):
        assert message.startswith("micro-batch 1: labels of tp ranks [1] differs")
    assert rank_pool(2).run(compare, differs=0) == [None, None]


def compare_parts(rank, world_size, token, sample):
    ids = torch.arange(12).reshape(2, 6)
    batch = Batch(ids, ids + 1, torch.ones(2, 6), ids % 6, torch.tensor([3, 4 + sample * (rank == 1)]))
    mesh = Mesh.build(1, world_size)
    part = cut_sequences(batch, mesh.cp_rank, world_size)
    part.input_ids[1, 0] += token * (rank == 1)
    try:
        check_replicas([part], mesh)
    except ParallelError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("token", "sample"), [(1, 0), (0, 1)])
def test_cp_parts_of_different_sequences_are_reported_on_every_rank(rank_pool, token, sample):
    for message in rank_pool(2).run(compare_parts, token=token, sample=sample):
        assert message.startswith("micro-batch 0: the parts of cp ranks [1] do not continue those before them")
    assert rank_pool(2).run(compare_parts, token=0, sample=0) == [None, None]
