"""Start and end a rank: process group, device, DeepSpeed's initialisation.

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
    """Rank, device and roles of this process. rank, world_size: in the default process group, that of its role.

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
    run time. teacher_ranks: so many of the job's last ranks hold only the teacher, in a default process group of
    their own.
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
    """Index of this process's CUDA device among the `visible` ones.

    A scheduler may make only one device visible to each process, as number 0. Raises ConfigError if there are too few.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise ConfigError(
            f"local rank {local_rank} finds {visible} CUDA devices on {os.uname().nodename}\n"
            "  why: every rank needs a device of its own\n"
            f"  fix: start {visible} ranks on this node, or make more devices visible (CUDA_VISIBLE_DEVICES)"
        )
    return local_rank


def collective_timeout() -> timedelta:
    """DEEPSPEED_TIMEOUT in minutes, else DEFAULT_TIMEOUT_MIN. Raises ConfigError unless it is a whole number above 0.

    DeepSpeed also reads the variable, as an integer, when it is imported.
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
    if (world_size := int(os.environ.get("WORLD_SIZE", "1"))) != 1:
        raise ConfigError(
            f"WORLD_SIZE = {world_size} in the environment, but MASTER_ADDR is not set\n"
            "  why: the ranks cannot find each other; training alone would be another run\n"
            "  fix: start it with a launcher, set MASTER_ADDR and MASTER_PORT, or unset WORLD_SIZE"
        )
    # Without a launcher the only rank uses a store in memory, which needs no free port.
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but missing from the type stubs
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


def _start_deepspeed(use_cuda: bool) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # the import resets the level
    # DeepSpeed 0.19 calls deprecated names; users of kdtrain cannot change that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not use_cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if use_cuda else "gloo", auto_mpi_discovery=False, verbose=False)


@contextmanager
def runtime(teacher_ranks: int = 0, *, deterministic: bool = False) -> Iterator[Runtime]:
    """`start` on entry; a barrier on exit, so that no launcher kills a rank that is slower to end.

    Communicates: `start`'s rendezvous and the barrier, which is left out after exceptions other than RunStopped, since
    other ranks may then be in another collective.
    """
    running = start(teacher_ranks, deterministic=deterministic)
    try:
        yield running
    except RunStopped:
        running.barrier()
        raise
    running.barrier()


def exit_process(exit_code: int) -> NoReturn:
    """Flush output and end this process without the interpreter's shutdown, in which gloo's threads sometimes abort.

    Call it last, and only in a process of its own, not in a notebook or test runner.
    """
    if exit_code in (EXIT_DONE, EXIT_STOPPED) and dist.is_initialized():
        dist.destroy_process_group()  # not after a failure: other ranks may be in a collective
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
