"""debug.check_replicas: what must be the same on all ranks of a tp group is compared, not believed."""

from __future__ import annotations

from dataclasses import fields

import torch

from kdtrain.data.batch import Batch
from kdtrain.dist.collectives import gather_ranks
from kdtrain.dist.mesh import Mesh
from kdtrain.errors import ParallelError


def check_replicas(micro_batches: list[Batch], mesh: Mesh) -> None:
    """ParallelError on every tp rank unless all of them hold the same micro-batches, element for element.

    Communicates: one all-gather over tp per micro-batch and field. Synchronises the device.
    """
    for number, batch in enumerate(micro_batches):
        for field in fields(Batch):
            everyone = gather_ranks(getattr(batch, field.name), mesh.tp_group)
            odd = [rank for rank in range(1, len(everyone)) if not torch.equal(everyone[rank], everyone[0])]
            if odd:
                raise ParallelError(
                    f"micro-batch {number}: {field.name} of tp ranks {odd} differs from tp rank 0's\n"
                    "  why: the ranks of a tp group must run the same tokens, or every gradient is wrong\n"
                    "  fix: give every node the same stores (fingerprints are in their manifest.json)"
                )
