"""Does this machine, with these ranks, do what a run will ask of it?   What `launch/check_setup.py` does.

Every check is a row of one table: what was looked at, ok, warn or FAIL (or - where it does not apply), and what was
found.
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
"""Minutes for a collective of a check, unless DEEPSPEED_TIMEOUT says otherwise: a run's hour is long to wait."""

ALIKE = ("version", "attention")
"""Checks that fail where ranks differ: ranks would silently compute one model in two ways."""
BETTER_ALIKE = ("kernels auto", "float32 products", "nccl settings", "compiler")


def run_checks(cfg: RunConfig) -> int:
    """Print the table on rank 0; 0 if nothing failed, else 1, on every rank. Reads run.output_dir, parallel,
    teacher.layout, train.kernels, zero.offload_optimizer, and attention and dtype of both models.

    Communicates: process groups, collectives along all axes, gathers of hosts, threads and all findings. Raises
    KdtrainError on a rank that cannot find the others.
    """
    _find_others(os.environ.get("MASTER_ADDR"))
    os.environ.setdefault("DEEPSPEED_TIMEOUT", TIMEOUT_MIN)
    with bootstrap.runtime() as rank:
        mesh = Mesh.build(*axes(cfg, rank.world_size))
        # every rank makes the same rows in the same order, so that they can be laid side by side
        world = mesh.world_group
        share = Share.of_this_rank(socket.gethostname())
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
        rows = merge(gather_objects(mine, world), [share.host for share in shares])
        if mesh.is_main:
            print(headline(environment_record(world_size=mesh.world_size)))
            print(format_table([{"check": r.check, "result": r.result, "found": r.found} for r in rows]))
            print(verdict(rows), flush=True)
    return EXIT_OTHER if any(row.result == "FAIL" for row in rows) else EXIT_DONE


def verdict(rows: Sequence[Row]) -> str:
    """The last line: how many checks failed, and how many rows warn."""
    failed, warned = (sum(row.result == result for row in rows) for result in ("FAIL", "warn"))
    text = f"{failed} of {len(rows)} checks failed" if failed else "setup    every check passed"
    return f"{text}, {warned} {'warning' if warned == 1 else 'warnings'}" if warned else text


def axes(cfg: RunConfig, world_size: int) -> tuple[int, int]:
    """(tp, cp) of the collectives to try: the run's; (1, 1) if dedicated teachers leave a job they do not divide."""
    tp, cp = cfg.parallel.tp, cfg.parallel.cp
    return (1, 1) if cfg.teacher.layout == "dedicated" and world_size % (tp * cp) else (tp, cp)


def mesh_row(cfg: RunConfig, mesh: Mesh) -> Row:
    """The axes that are tried, and what a run has besides. Does not communicate."""
    text = f"dp {mesh.dp_size} x cp {mesh.cp_size} x tp {mesh.tp_size}"
    if cfg.teacher.layout != "dedicated":
        return Row("mesh", "-", text)
    if (mesh.tp_size, mesh.cp_size) != (cfg.parallel.tp, cfg.parallel.cp):
        text += f"; parallel.tp = {cfg.parallel.tp} x parallel.cp = {cfg.parallel.cp} divide the student's ranks only"
    return Row("mesh", "-", text + "; all ranks as one world, without the teacher's messages")


def _find_others(address: str | None) -> None:
    """KdtrainError if the name of the first rank's host means nothing here: joining would wait for minutes."""
    if address is None:
        return
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise KdtrainError(
            f"{socket.gethostname()} does not know the host MASTER_ADDR = {address}: {error.strerror}\n"
            "  why: the ranks meet there\n"
            "  fix: mend DNS or /etc/hosts on this node, or export MASTER_ADDR with the first node's IP address"
        ) from error


def merge(ranks: Sequence[Sequence[Row]], hosts: Sequence[str]) -> list[Row]:
    """Rows of all ranks, which all have the same checks, as one table: ranks that found the same share a line.

    hosts: of each rank. What ALIKE names must be the same everywhere, what BETTER_ALIKE names had better be.
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
    """`rank 3` or `ranks 0-7, 9`, and of which hosts if the job has several."""
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
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    return next(iter(done.stdout.split()), "unknown") if done.returncode == 0 else "unknown"


def device_row(device: torch.device) -> Row:
    """This rank's device and its memory."""
    if device.type != "cuda":
        return Row("device", "-", f"cpu, {os.cpu_count()} cores")
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    # in tens of a percent: ranks with like devices share a line
    used = f"{10 * round(10 * (1 - free / total))}% used"
    name = f"{properties.name}, compute {properties.major}.{properties.minor}, {total / 2**30:.0f} GiB, {used}"
    return Row.judged("device", free > total / 2, name)


def disk_rows(output_dir: Path, mesh: Mesh) -> list[Row]:
    """Free space where runs will be written, whether this rank may write there, and whether all see the same folder.

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
    first = gather_objects(made, mesh.world_group)[0]
    seen = first is not None and Path(first).is_dir()
    gather_objects(None, mesh.world_group)  # nobody removes its folder while others look
    if made is not None:
        os.rmdir(made)
    if mesh.world_size == 1:
        return [row]
    text = "every rank sees what rank 0 writes" if seen else "does not see what rank 0 writes: checkpoints need that"
    return [row, Row.judged("disk shared", seen, text)]
