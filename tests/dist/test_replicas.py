"""Ranks of a tp group with different tokens are found out."""

import pytest
import torch

from kdtrain.data.batch import Batch
from kdtrain.dist.mesh import Mesh
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


def test_one_rank_with_other_labels_is_named_on_every_rank(rank_pool):
    for message in rank_pool(2).run(compare, differs=1):
        assert message.startswith("micro-batch 1: labels of tp ranks [1] differs")
    assert rank_pool(2).run(compare, differs=0) == [None, None]
