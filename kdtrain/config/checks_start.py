"""Reasons why a run may not start as it was started: how many ranks there are, where it begins, its lock."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kdtrain.config.problems import Problem
from kdtrain.config.schema import RunConfig, RunSection


def problems(cfg: RunConfig, world_size: int) -> Iterator[Problem]:
    """Of parallel.world_size, run.continue_from and run.lock_lease_s. world_size: ranks of the whole job."""
    yield from _ranks(cfg.parallel.world_size, world_size)
    yield from _beginning(cfg.run)
    if cfg.run.lock_lease_s is not None and not 0 < cfg.run.lock_lease_s < math.inf:
        yield Problem(
            "run.lock_lease_s", cfg.run.lock_lease_s, "is not a positive number", "60 is usual, null: no lease"
        )


def _ranks(wanted: int | None, world_size: int) -> Iterator[Problem]:
    key = "parallel.world_size"
    if wanted is not None and wanted < 1:
        yield Problem(key, wanted, "is smaller than 1", "use the number of ranks of the job, or null")
    elif wanted is not None and wanted != world_size:
        started = f"ranks are expected, and {world_size} {'was' if world_size == 1 else 'were'} started"
        fix = (
            "look at the launcher: deepspeed starts this node alone when it does not find its --hostfile "
            "(/job/hostfile unless named), srun as many as --ntasks says; or set parallel.world_size=null"
        )
        yield Problem(key, wanted, started, fix)


def _beginning(run: RunSection) -> Iterator[Problem]:
    if run.continue_from is not None and run.resume not in ("auto", "never"):
        why = f"while run.resume = {run.resume}: a run begins at one checkpoint"
        fix = (
            "keep run.continue_from for a new stage (other data, steps from 0), or run.resume to go on with the same "
            "data where the checkpoint stopped; run.resume=auto resumes the new stage itself"
        )
        yield Problem("run.continue_from", run.continue_from, why, fix)
