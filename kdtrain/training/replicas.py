"""debug.check_replicas: compare the micro-batches of the ranks of a tp group and of a cp group."""

from __future__ import annotations

from dataclasses import fields

import torch

from kdtrain.batch import Batch
from kdtrain.distributed.collectives import gather_ranks
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ParallelError


def check_replicas(micro_batches: list[Batch], mesh: Mesh) -> None:
    """Raise ParallelError unless tp ranks hold equal micro-batches and the parts of cp ranks form whole sequences.

    Communicates: one all-gather over tp per micro-batch and field, one over cp per micro-batch; all ranks of a group
    raise together. Synchronises the device.
    """
    for number, batch in enumerate(micro_batches):
        for field, values in zip(fields(Batch), batch.tensors(), strict=False):  # the first fields are the tensors
            # ranks with different tokens would add up unrelated activations
            everyone = gather_ranks(values, mesh.tp_group)
            odd = [rank for rank in range(1, len(everyone)) if not torch.equal(everyone[rank], everyone[0])]
            if odd:
                raise ParallelError(
                    f"micro-batch {number}: {field.name} of tp ranks {odd} differs from tp rank 0's\n"
                    "  why: the ranks of a tp group must run the same tokens, or every gradient is wrong\n"
                    "  fix: give every node the same stores (fingerprints are in their manifest.json)"
                )
        _check_parts(number, batch, mesh)


def _check_parts(number: int, batch: Batch, mesh: Mesh) -> None:
    """Check that the last label of a part is the first token of the next, and that all parts have the same samples."""
    ends = torch.stack([batch.sample_ids, batch.input_ids[:, 0], batch.labels[:, -1]])
    # attention exchanges heads over cp and would mix parts of different sequences
    everyone = gather_ranks(ends, mesh.cp_group)  # [cp, 3, B]
    odd = [
        rank
        for rank in range(1, len(everyone))
        if not torch.equal(everyone[rank][0], everyone[0][0])
        or not torch.equal(everyone[rank][1], everyone[rank - 1][2])
    ]
    if odd:
        raise ParallelError(
            f"micro-batch {number}: the parts of cp ranks {odd} do not continue those before them\n"
            "  why: the ranks of a cp group must hold parts of the same sequences, or attention mixes different texts\n"
            "  fix: give every node the same stores (fingerprints are in their manifest.json)"
        )
