"""Rank and world size, from the environment variables that launchers set."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from kdtrain.errors import ConfigError

SLURM_VARIABLES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Job steps with this or a larger id are the batch script itself and SLURM's own steps."""
FIRST_PORT, NUM_PORTS = 20000, 10000


def fill_launcher_environment(environ: MutableMapping[str, str]) -> None:
    """Under srun without another launcher, derive RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Only in a job step of several tasks, and only what is missing: a batch script that starts one process stays a job
    of one rank. The address is the step's first node; the port is derived from the job's id, equal in every task.
    """
    step = int(environ.get("SLURM_STEP_ID", FIRST_SPECIAL_STEP))
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    if "RANK" in environ or step >= FIRST_SPECIAL_STEP or int(tasks) < 2:
        return
    environ.setdefault("WORLD_SIZE", tasks)
    for name, source in SLURM_VARIABLES.items():
        if source in environ:
            environ.setdefault(name, environ[source])
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
    if nodes:
        environ.setdefault("MASTER_ADDR", first_node(nodes))
    job = int(environ.get("SLURM_JOB_ID", "0")) + step
    environ.setdefault("MASTER_PORT", str(FIRST_PORT + job % NUM_PORTS))


def first_node(nodes: str) -> str:
    """First host of a SLURM node list: "gpu[003-010,12],login" -> "gpu003"."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])+", nodes)
    return nodes if first is None else re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def world_size(environ: Mapping[str, str]) -> int:
    """Number of ranks that the launcher set, 1 without one. Raises ConfigError if it is not a positive integer."""
    text = environ.get("WORLD_SIZE", "1")
    if not re.fullmatch(r"[1-9][0-9]*", text):
        raise ConfigError(
            f"the environment variable WORLD_SIZE is {text!r}, not a number of ranks\n"
            "  why: launchers set it, and every rank needs the number of ranks\n"
            "  fix: unset it, or start through deepspeed, torchrun or srun"
        )
    return int(text)


def require_meeting_point(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if there are several ranks and no address at which they connect.

    Otherwise each rank would start a job of one rank and train alone.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if world_size(environ) > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set\n"
            "  why: without them the ranks cannot connect, and each would train alone\n"
            "  fix: start through deepspeed, torchrun or srun, or export MASTER_ADDR (the first node) and MASTER_PORT"
        )
