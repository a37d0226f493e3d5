"""Checks of a machine and its ranks before a run: `launch/check_setup.py`.

Each check is a row of one table: its name, ok, warn or FAIL (- where it does not apply), and the finding.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from kdtrain.config.schema import RunConfig
from kdtrain.distributed.collectives import gather_objects
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import bootstrap
from kdtrain.errors import EXIT_DONE, EXIT_OTHER, KdtrainError
from kdtrain.jobs.check_setup.probes import Row, collective_rows, kernel_rows
from kdtrain.jobs.check_setup.settings import Share, settings_rows
from kdtrain.telemetry.console import format_table
from kdtrain.telemetry.environment import environment_record, headline

TIMEOUT_MIN = "2"
"""Time-out of a check's collectives in minutes, unless DEEPSPEED_TIMEOUT is set; a run's default is an hour."""

ALIKE = ("version", "attention")
"""Checks that fail if ranks differ: the ranks of one model would silently compute it in two ways."""
BETTER_ALIKE = ("kernels auto", "float32 products", "nccl settings", "compiler")
"""Checks that warn if ranks differ."""


def run_checks(cfg: RunConfig) -> int:
    """Print the table on rank 0; returns 0 if nothing failed, else 1, on every rank.

    Reads run.output_dir, parallel, teacher.layout, train.kernels, zero.offload_optimizer, and attention and dtype of
    both models. Communicates: process groups, collectives along all axes, gathers of hosts, threads and findings.
    Raises KdtrainError on a rank that cannot resolve the master's address.
    """
    _check_master(os.environ.get("MASTER_ADDR"))
    os.environ.setdefault("DEEPSPEED_TIMEOUT", TIMEOUT_MIN)
    with bootstrap.runtime() as rank:
        mesh = Mesh.build(*axes(cfg, rank.world_size))
        # every rank makes the same rows in the same order, so that rank 0 can merge them
        world = mesh.world_group
        share = Share.of_this_rank(socket.gethostname())
        # whether ranks share CPUs shows only in the masks of all of them
        shares = gather_objects(share, world)
        mine = [
            *versions(),
            device_row(rank.device),
            mesh_row(cfg, mesh),
            *settings_rows(cfg, mesh, rank.device, share, shares, os.environ),
            *kernel_rows(mesh, rank.device, cfg.train.kernels),
            *collective_rows(mesh, rank.device),
            *disk_rows(Path(cfg.run.output_dir), mesh),
        ]
        # rank 0 prints the findings of all ranks, and every rank returns the same exit code
        rows = merge(gather_objects(mine, world), [share.host for share in shares])
        if mesh.is_main:
            print(headline(environment_record(world_size=mesh.world_size)))
            print(format_table([{"check": r.check, "result": r.result, "found": r.found} for r in rows]))
            print(verdict(rows), flush=True)
    return EXIT_OTHER if any(row.result == "FAIL" for row in rows) else EXIT_DONE


def verdict(rows: Sequence[Row]) -> str:
    """The last line: the number of failed checks and of warnings."""
    failed, warned = (sum(row.result == result for row in rows) for result in ("FAIL", "warn"))
    text = f"{failed} of {len(rows)} checks failed" if failed else "setup    every check passed"
    return f"{text}, {warned} {'warning' if warned == 1 else 'warnings'}" if warned else text


def axes(cfg: RunConfig, world_size: int) -> tuple[int, int]:
    """(tp, cp) of the checked collectives: the run's; (1, 1) if they do not divide a job with a dedicated teacher."""
    tp, cp = cfg.parallel.tp, cfg.parallel.cp
    return (1, 1) if cfg.teacher.layout == "dedicated" and world_size % (tp * cp) else (tp, cp)


def mesh_row(cfg: RunConfig, mesh: Mesh) -> Row:
    """The axes that are checked, and those of the run that are not. Does not communicate."""
    text = f"dp {mesh.dp_size} x cp {mesh.cp_size} x tp {mesh.tp_size}"
    if cfg.teacher.layout != "dedicated":
        return Row("mesh", "-", text)
    if (mesh.tp_size, mesh.cp_size) != (cfg.parallel.tp, cfg.parallel.cp):
        text += f"; parallel.tp = {cfg.parallel.tp} x parallel.cp = {cfg.parallel.cp} divide the student's ranks only"
    return Row("mesh", "-", text + "; all ranks as one world, without the teacher's messages")


def _check_master(address: str | None) -> None:
    """Raise KdtrainError if this host cannot resolve `address`: joining the job would wait for minutes."""
    if address is None:
        return
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise KdtrainError(
            f"{socket.gethostname()} cannot resolve MASTER_ADDR = {address}: {error.strerror}\n"
            "  why: the ranks of a job connect to it\n"
            "  fix: repair DNS or /etc/hosts on this node, or export MASTER_ADDR with the first node's IP address"
        ) from error


def merge(ranks: Sequence[Sequence[Row]], hosts: Sequence[str]) -> list[Row]:
    """The rows of all ranks as one table, in which ranks with the same finding share a line.

    hosts: of each rank. Findings of checks in ALIKE must be equal on all ranks; those in BETTER_ALIKE should be.
    """
    merged = [Row("ranks", "-", f"{len(ranks)} on {len(set(hosts))} hosts: {_listed(list(dict.fromkeys(hosts)))}")]
    for rows in zip(*ranks, strict=True):
        groups: dict[Row, list[int]] = {}
        for rank, row in enumerate(rows):
            groups.setdefault(row, []).append(rank)
        for row, members in groups.items():
            result, where = row.result, ""
            if len(groups) > 1:
                where = f"   [{_members(members, hosts)}]"
                if row.check.startswith(ALIKE):
                    result = "FAIL"
                elif row.check.startswith(BETTER_ALIKE) and result != "FAIL":
                    result = "warn"
            merged.append(Row(row.check, result, row.found + where))
    return merged


def _members(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`rank 3` or `ranks 0-7, 9`, with their hosts if the job has several."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ("rank " if len(ranks) == 1 else "ranks ") + _listed([str(a) if a == b else f"{a}-{b}" for a, b in spans])
    if len(set(hosts)) > 1:
        text += " on " + _listed(list(dict.fromkeys(hosts[rank] for rank in ranks)))
    return text


def _listed(items: Sequence[object], most: int = 8) -> str:
    text = ", ".join(map(str, items[:most]))
    return text if len(items) <= most else f"{text} and {len(items) - most} more"


def versions() -> list[Row]:
    """Python, packages, driver, CUDA and NCCL. Does not communicate."""
    about = environment_record()
    found = {"python": about["python"], **dict.fromkeys(("torch", "deepspeed", "transformers", "numpy"), "missing")}
    found |= {"triton": "none", "cuda": about["cuda"] or "none", "driver": _driver()}
    found |= {name: version for name, version in about["packages"].items() if name in found}
    found["nccl"] = about["nccl"] or "none"
    return [Row.judged(f"version {name}", version != "missing", version) for name, version in found.items()]


def _driver() -> str:
    """The NVIDIA driver's version by nvidia-smi, "none" without it."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    return next(iter(done.stdout.split()), "unknown") if done.returncode == 0 else "unknown"


def device_row(device: torch.device) -> Row:
    """This rank's device and its memory."""
    if device.type != "cuda":
        return Row("device", "-", f"cpu, {os.cpu_count()} cores")
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    # rounded to 10 %, so that ranks with similar devices share a line
    used = f"{10 * round(10 * (1 - free / total))}% used"
    name = f"{properties.name}, compute {properties.major}.{properties.minor}, {total / 2**30:.0f} GiB, {used}"
    return Row.judged("device", free > total / 2, name)


def disk_rows(output_dir: Path, mesh: Mesh) -> list[Row]:
    """Free space in run.output_dir, whether this rank may write there, and whether all ranks see the same folder.

    Leaves nothing behind. Communicates: two broadcasts or gathers over the world.
    """
    folder = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.is_dir())
    made: str | None = None
    try:
        made = tempfile.mkdtemp(prefix=".kdtrain_setup_", dir=folder)
        free = shutil.disk_usage(folder).free / 2**30
        row = Row("disk", "ok", f"{folder}: writable, {free:.0f} GiB free")
    except OSError as error:
        row = Row("disk", "FAIL", f"{folder}: {error.strerror}; set run.output_dir to a folder you may write")
    # every rank looks for rank 0's folder, to see whether the file system is shared
    first = gather_objects(made, mesh.world_group)[0]
    seen = first is not None and Path(first).is_dir()
    gather_objects(None, mesh.world_group)  # a barrier: rank 0 must not remove its folder before all have looked
    if made is not None:
        os.rmdir(made)
    if mesh.world_size == 1:
        return [row]
    text = "every rank sees what rank 0 writes" if seen else "does not see what rank 0 writes: checkpoints need that"
    return [row, Row.judged("disk shared", seen, text)]
