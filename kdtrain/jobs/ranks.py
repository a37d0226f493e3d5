"""Work that rank 0 does for all ranks, and values that all ranks must share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from kdtrain.distributed.collectives import gather_objects
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError, KdtrainError

T = TypeVar("T")


def on_main(mesh: Mesh, work: Callable[[], T], *, share: bool = True) -> T | None:
    """Do `work` on rank 0 only. If it raises a KdtrainError or OSError, every rank raises, so that none waits for it.

    Returns the result of `work` on rank 0 and, with `share`, on all ranks (it must pickle); else None there.
    Communicates: one broadcast over the world.
    """
    result: T | None = None
    failure: KdtrainError | None = None
    if mesh.is_main:
        try:
            result = work()
        except KdtrainError as error:
            failure = error
        except OSError as error:
            failure = ConfigError(
                f"{error.filename or 'the run folder'}: [Errno {error.errno}] {error.strerror}\n"
                "  fix: free space, check quota and permissions of run.output_dir"
            )
    if mesh.world_size > 1:
        shared: list[Any] = [(result if share else None, failure)]
        # Without it a failure on rank 0 would leave the other ranks in their next collective until its timeout.
        dist.broadcast_object_list(shared, src=0, group=mesh.world_group)
        if not mesh.is_main:
            result, failure = shared[0]
    if failure is not None:
        raise failure
    return result


def require_same(mesh: Mesh, what: str, digest: str) -> None:
    """Raise ConfigError on every rank unless all have the same `digest` of `what`. One gather over the world."""
    # ranks with different settings would wait for each other in collectives that do not match
    found = gather_objects(digest, mesh.world_group)
    odd = [rank for rank, other in enumerate(found) if other != found[0]]
    if odd:
        raise ConfigError(
            f"the {what} of ranks {odd} differs from rank 0's ({found[odd[0]][:12]} and {found[0][:12]})\n"
            "  why: ranks that disagree would hang or train different models\n"
            "  fix: give every node the same files and the same command line"
        )
