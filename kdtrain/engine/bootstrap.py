"""Start and end a rank: process group, device, and DeepSpeed's habits.

Works under the `deepspeed` launcher, torchrun, SLURM (`kdtrain.config.launcher` fills in the variables) and with no
launcher at all, as a world of one.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from kdtrain.distributed.point_to_point import P2PChannel
from kdtrain.distributed.roles import Roles, split_world
from kdtrain.engine.process import compute_deterministically, order_nccl_launches
from kdtrain.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, RunStopped

DEFAULT_TIMEOUT_MIN = 60
"""Minutes a collective may wait. DeepSpeed's 10 are too few while one rank still reads a large teacher."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where this rank runs. rank, world_size: in the default process group, which is that of its role.

    channel: to the ranks of the other role; None if all ranks are the student's.
    """

    rank: int
    world_size: int
    device: torch.device
    roles: Roles
    channel: P2PChannel | None = None

    def barrier(self) -> None:
        """Wait for all ranks, of both roles."""
        # No rank of a role may end while another is still working: the launcher would kill it.
        dist.barrier()
        if self.channel is not None:
            self.channel.barrier()


def start(teacher_ranks: int = 0, *, deterministic: bool = False) -> Runtime:
    """Join the process group and pick the device. Every rank must call it, once, before any engine is built.

    NCCL on CUDA, gloo on the CPU, where DeepSpeed's shared-memory operator is switched off: it would be compiled at
    run time. teacher_ranks: of the job's last ranks hold only the teacher, and form a world of their own.
    deterministic: as debug.deterministic, for the whole process.
    Communicates: rendezvous of all ranks. Raises ConfigError when the environment cannot work.
    """
    if deterministic:
        compute_deterministically(os.environ)
    use_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if use_cuda:
        index = device_index(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed sets the device from it, engine by engine
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        order_nccl_launches(os.environ)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        device = torch.device("cpu")
    backend, channel = "nccl" if use_cuda else "gloo", None
    if teacher_ranks:
        roles, channel = _split_job(backend, teacher_ranks)
    else:
        _start_process_group(backend)
        roles = Roles(dist.get_rank(), dist.get_world_size(), 0)
    _start_deepspeed(use_cuda)
    return Runtime(dist.get_rank(), dist.get_world_size(), device, roles, channel)


def device_index(local_rank: int, visible: int) -> int:
    """Which of the `visible` CUDA devices is this process's.

    A scheduler may show each process its own device only, as number 0. Raises ConfigError when there are too few.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise ConfigError(
            f"local rank {local_rank} finds {visible} CUDA devices on {os.uname().nodename}\n"
            "  why: every rank needs a device of its own\n"
            f"  fix: start {visible} ranks on this node, or show it more devices (CUDA_VISIBLE_DEVICES)"
        )
    return local_rank


def collective_timeout() -> timedelta:
    """DEEPSPEED_TIMEOUT in minutes, else DEFAULT_TIMEOUT_MIN. Raises ConfigError unless it is a whole number above 0.

    DeepSpeed reads it too, as an integer, while it is imported.
    """
    text = os.environ.get("DEEPSPEED_TIMEOUT", str(DEFAULT_TIMEOUT_MIN))
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", text):
        raise ConfigError(
            f"DEEPSPEED_TIMEOUT = {text!r} in the environment is not a whole number of minutes\n"
            "  why: it limits how long a collective waits for the slowest rank\n"
            f"  fix: unset it ({DEFAULT_TIMEOUT_MIN} minutes then), or give 1 or more"
        )
    return timedelta(minutes=int(text))


def _split_job(backend: str, teacher_ranks: int) -> tuple[Roles, P2PChannel]:
    """A default group per role, from the store at which all ranks of the job meet."""
    roles = Roles.of(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), teacher_ranks)
    timeout = collective_timeout()
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    return roles, split_world(store, roles, backend, timeout)


def _start_process_group(backend: str) -> None:
    if dist.is_initialized():
        return
    timeout = collective_timeout()
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    if (announced := int(os.environ.get("WORLD_SIZE", "1"))) != 1:
        raise ConfigError(
            f"WORLD_SIZE = {announced} in the environment, but MASTER_ADDR is not set\n"
            "  why: the ranks cannot find each other; training alone would be another run\n"
            "  fix: start it with a launcher, set MASTER_ADDR and MASTER_PORT, or unset WORLD_SIZE"
        )
    # No launcher: a world of one meets itself in memory and needs no free port.
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but its stub forgets it
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


def _start_deepspeed(use_cuda: bool) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # importing it set the level back
    # DeepSpeed 0.19 still calls the old names; nobody who reads a run's output can change that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not use_cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if use_cuda else "gloo", auto_mpi_discovery=False, verbose=False)


@contextmanager
def runtime(teacher_ranks: int = 0, *, deterministic: bool = False) -> Iterator[Runtime]:
    """`start` on entry. Ranks that end well, or stop after saving, leave together: no launcher kills a slower one.

    Communicates: `start`'s rendezvous and, unless another exception passes, a barrier at the end.
    """
    running = start(teacher_ranks, deterministic=deterministic)
    try:
        yield running
    except RunStopped:
        running.barrier()
        raise
    running.barrier()


def leave(exit_code: int) -> NoReturn:
    """End this process now: flush, and skip interpreter tear-down, where gloo's threads abort now and then.

    Call it last, and only in a process that is nothing but a rank.
    """
    if exit_code in (EXIT_DONE, EXIT_STOPPED) and dist.is_initialized():
        dist.destroy_process_group()  # not after a failure: other ranks may be in a collective
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
