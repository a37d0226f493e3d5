"""Settings of a rank's process that libraries read once, or only from the environment."""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Mapping, MutableMapping

import torch

from kdtrain.errors import ConfigError
from kdtrain.log import LOGGER

LAUNCH_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"
CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS computes the same bits twice on several streams."""


def order_nccl_launches(environ: MutableMapping[str, str]) -> None:
    """Set NCCL_LAUNCH_ORDER_IMPLICIT=1 unless `environ` has a value. Before the first NCCL communicator.

    Data, tensor and context parallel groups have separate communicators, and DeepSpeed reduces gradients on another
    stream than the backward pass. Two NCCL kernels that start in different orders on two devices can then deadlock,
    each waiting for the resources of the other. With the setting NCCL (2.26 and later) starts them in the order of the
    host's calls, which is the same on all ranks; CUDA below 12.3 then runs one at a time.
    """
    if LAUNCH_ORDER in environ:
        LOGGER.info("nccl     %s = %s, from the environment", LAUNCH_ORDER, environ[LAUNCH_ORDER])
        return
    environ[LAUNCH_ORDER] = "1"
    LOGGER.info("nccl     %s = 1: kernels of several groups start in the order of calls", LAUNCH_ORDER)


def compute_deterministically(environ: MutableMapping[str, str]) -> None:
    """Select deterministic algorithms of torch, cuBLAS and flash-attention for the rest of this process.

    Call it before CUDA is used. An operation without a deterministic algorithm raises RuntimeError when it is called.
    Raises ConfigError if a value in `environ` contradicts the setting.
    """
    flash, cublas = "FLASH_ATTENTION_DETERMINISTIC", "CUBLAS_WORKSPACE_CONFIG"
    for name, good in ((flash, ("1",)), (cublas, CUBLAS_WORKSPACES)):
        if environ.setdefault(name, good[0]) not in good:
            raise ConfigError(
                f"debug.deterministic = true, but {name} = {environ[name]!r} in the environment\n"
                f"  why: with that value gradients may differ between two runs\n"
                f"  fix: unset it, or set it to {' or '.join(good)}"
            )
    torch.use_deterministic_algorithms(True)
    LOGGER.info("debug    deterministic algorithms only: slower, and an operation without one ends the run")


def import_muon(environ: MutableMapping[str, str]) -> None:
    """Import DeepSpeed's Muon optimizer with torch.compile switched off. Before `deepspeed.initialize`.

    DeepSpeed 0.19 imports its module in every run, to compare classes, and its decorators then import torch's compiler,
    which takes a second. Here that optimizer is never used; in this process it computes without the compiler.
    """
    name = "TORCHDYNAMO_DISABLE"
    before = environ.get(name)
    environ[name] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    except ImportError:  # another release of DeepSpeed keeps it elsewhere: nothing is gained, nothing lost
        LOGGER.debug("DeepSpeed has no deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        if before is None:
            del environ[name]
        else:
            environ[name] = before


def own_cpus() -> frozenset[int]:
    """Logical CPUs that this process may run on. A container's quota of CPU time is not taken into account."""
    has_mask = hasattr(os, "sched_getaffinity")  # Linux only
    return frozenset(os.sched_getaffinity(0) if has_mask else range(os.cpu_count() or 1))


def host_threads(mine: Collection[int], masks: Collection[Collection[int]], environ: Mapping[str, str]) -> int | None:
    """Threads for work in host memory: this rank's part of the cores it may use, at least 1; None: do not change them.

    mine: cores of this rank's affinity mask; masks: those of all ranks on this host, this one's included, each of which
    may be the whole host or a part that a launcher bound to the rank. A user's OMP_NUM_THREADS is kept; the 1 that
    torchrun sets by default (its processes have TORCHELASTIC_RUN_ID) is not.
    """
    chosen = environ.get("OMP_NUM_THREADS")
    if chosen is not None and not (chosen == "1" and "TORCHELASTIC_RUN_ID" in environ):
        return None
    share = sum(1 / max(1, sum(core in mask for mask in masks)) for core in mine)
    return max(1, int(share + 1e-9))
