"""Start and end a rank: process group, device, and DeepSpeed's habits.

Works under the `deepspeed` launcher, torchrun, SLURM (`kdtrain.config.cli` fills in the variables) and with no launcher
at all, as a world of one.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

DEFAULT_TIMEOUT_MIN = 60
"""Minutes a collective may wait. DeepSpeed's 10 are too few while one rank still reads a large teacher."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where this rank runs."""

    rank: int
    world_size: int
    device: torch.device


def start() -> Runtime:
    """Join the process group and pick the device. Every rank must call it, once, before any engine is built.

    NCCL on CUDA, gloo on the CPU, where DeepSpeed's shared-memory operator is switched off: it would be compiled at
    run time. Communicates: rendezvous of all ranks.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    use_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if not use_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    _start_process_group("nccl" if use_cuda else "gloo")
    _start_deepspeed(use_cuda)
    return Runtime(dist.get_rank(), dist.get_world_size(), device)


def _start_process_group(backend: str) -> None:
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=float(os.environ.get("DEEPSPEED_TIMEOUT", DEFAULT_TIMEOUT_MIN)))
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    # No launcher: a world of one meets itself in a file and needs no free port.
    folder = tempfile.mkdtemp(prefix="kdtrain_")
    store = Path(folder) / "rendezvous"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1, timeout=timeout)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    store.unlink(missing_ok=True)
    Path(folder).rmdir()


def _start_deepspeed(use_cuda: bool) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not use_cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if use_cuda else "gloo", auto_mpi_discovery=False, verbose=False)


@contextmanager
def runtime() -> Iterator[Runtime]:
    """`start` on entry; on a clean exit a barrier, so that no rank leaves while another still needs it."""
    running = start()
    yield running
    if dist.is_initialized():
        dist.barrier()


def leave(exit_code: int) -> None:
    """End this process now: flush, and skip interpreter tear-down, where gloo's threads abort now and then.

    Does not return. Call it last, and only in a process that is nothing but a rank.
    """
    if exit_code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
