"""Choices and settings of a run on this machine: compiler, kernels, attention, NCCL, TF32, threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from kdtrain_kernels.dispatch import choice

from kdtrain.config.schema import RunConfig, StudentSection, TeacherSection
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.process import LAUNCH_ORDER, host_threads, own_cpus
from kdtrain.errors import ConfigError
from kdtrain.jobs.check_setup.probes import Result, Row
from kdtrain.models.attention import compute_capability, resolve_attention
from kdtrain.models.attention_packages import attention_packages, installed_version
from kdtrain.telemetry.environment import TF32_VARIABLES, nccl_version, settings

FIRST_WITH_LAUNCH_ORDER = (2, 26)
NCCL_FILES = ("~/.nccl.conf", "/etc/nccl.conf")
"""Files with NCCL's settings that the environment does not set; NCCL_CONF_FILE replaces the first."""
SIDE = 256
"""Size of the product that reveals TF32: the exact result needs 21 of float32's 24 bits in any summation order."""


def settings_rows(
    cfg: RunConfig, mesh: Mesh, device: torch.device, mine: Share, ranks: Sequence[Share], environ: Mapping[str, str]
) -> list[Row]:
    """Rows of the settings that a run's choices depend on besides versions; the same checks on every rank.

    mine: this rank's share of its host; ranks: those of all. Does not communicate.
    """
    return [
        compiler_row(device, environ),
        kernels_row(device),
        *attention_rows(cfg, device),
        float32_row(device, environ),
        nccl_row(mesh, {**nccl_files(environ, NCCL_FILES), **settings(environ)}, nccl_version()),
        threads_row(mine, ranks, environ, offload=cfg.zero.offload_optimizer),
    ]


def compiler_row(device: torch.device, environ: Mapping[str, str]) -> Row:
    """Whether the compiler that Triton takes (CC, else gcc, else clang) builds a module with Python's headers.

    Triton compiles the launcher of each kernel at its first use. Writes into a temporary folder only.
    """
    path = environ.get("PATH")
    compiler = environ.get("CC", shutil.which("gcc", path=path) or shutil.which("clang", path=path))
    if compiler is None:
        problem = "none: neither CC nor gcc nor clang"
    elif not (problem := _build_problem(compiler)):
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=False)
        version = next(iter(done.stdout.splitlines()), compiler)
        return Row("compiler", "ok", f"{version}: builds what Triton needs")
    return Row("compiler", _bad_on_cuda(device), f"{problem}; Triton compiles a launcher for each kernel")


def _build_problem(compiler: str) -> str:
    """Why `compiler` cannot build an extension module; empty if it can."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's name of the same scheme
    include = sysconfig.get_paths(scheme=scheme)["include"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "launcher.c"
            source.write_text("#include <Python.h>\nPyObject *none(void) { Py_RETURN_NONE; }\n")
            done = subprocess.run(
                [compiler, str(source), "-shared", "-fPIC", f"-I{include}", "-o", f"{folder}/launcher.so"],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                env={**os.environ, "LC_ALL": "C"},
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler} cannot be run: {getattr(error, 'strerror', None) or type(error).__name__}"
    if done.returncode == 0:
        return ""
    errors = [line for line in done.stderr.splitlines() if "error" in line] or ["it fails"]
    # without the name of the temporary folder, which differs between ranks
    text = errors[0].removeprefix(str(source)).lstrip(":0123456789 ")
    return f"{compiler} cannot build with Python's headers: {text}"


def kernels_row(device: torch.device) -> Row:
    """The backend that train.kernels=auto takes on this device, and the reason."""
    name, reason = choice(device)
    reason = reason.replace(
        str(device), device.type
    )  # without its number, so that ranks with the same finding share a line
    return Row("kernels auto", "-" if name == "triton" else _bad_on_cuda(device), f"{name}: {reason}")


def attention_rows(cfg: RunConfig, device: torch.device) -> list[Row]:
    """Packages of flash-attention, the choice of attention=auto by dtype, and explicit choices of `cfg`.

    An explicit choice that is not available fails. An architecture may rule out others, which only loading it shows.
    """
    rows = []
    for name, found in attention_packages():
        version = installed_version(name)
        result: Result = "-" if version is None else "ok" if found == version else "warn"
        rows.append(Row(f"attention {name}", result, found))
    for dtype in ("bfloat16", "float32"):
        taken, reason = _resolved("auto", dtype, device)
        rows.append(Row(f"attention auto {dtype}", "-", f"{taken}: {reason.removeprefix('auto: ')}"))
    explicit = (
        _explicit_row(role, section, device) for role, section in (("student", cfg.student), ("teacher", cfg.teacher))
    )
    return [*rows, *(row for row in explicit if row is not None)]


def _resolved(wanted: str, dtype: str, device: torch.device) -> tuple[str, str]:
    capability = compute_capability(device)
    return resolve_attention(wanted, device_type=device.type, dtype=dtype, capability=capability)


def _explicit_row(role: str, section: StudentSection | TeacherSection, device: torch.device) -> Row | None:
    if section.attention == "auto":
        return None
    try:
        _resolved(section.attention, section.dtype, device)
    except ConfigError as error:
        return Row(f"attention {role}", "FAIL", str(error).partition("\n")[0])
    return Row(f"attention {role}", "ok", f"{section.attention} in {section.dtype}, as configured")


def nccl_row(mesh: Mesh, found: Mapping[str, str], version: str | None) -> Row:
    """NCCL's settings, and whether collectives start in the order of the host.

    With several axes, two communicators work on a device at once and may deadlock unless every rank launches them in
    one order. found: settings of the environment and NCCL's files. version: of NCCL; None without a CUDA device, where
    the row only informs.
    """
    listed = ", ".join(f"{name}={value}" for name, value in sorted(found.items()) if "NCCL_" in name) or "none set"
    if version is None:
        return Row("nccl settings", "-", f"{listed}; no CUDA device")
    if not re.fullmatch(r"[+-]?0*[1-9][0-9]*", found.get(LAUNCH_ORDER, "0")):
        state = f"{LAUNCH_ORDER} is off"
    elif tuple(map(int, version.split(".")[:2])) < FIRST_WITH_LAUNCH_ORDER:
        state = f"NCCL {version} does not have {LAUNCH_ORDER}"
    else:
        return Row("nccl settings", "ok", f"{listed}; collectives start in the order of the host")
    several = sum(size > 1 for size in (mesh.dp_size, mesh.tp_size, mesh.cp_size)) > 1
    risk = ": collectives of two axes may wait for each other" if several else ""
    return Row("nccl settings", "warn" if several else "-", f"{listed}; {state}{risk}")


def nccl_files(environ: Mapping[str, str], files: Sequence[str]) -> dict[str, str]:
    """Settings of NCCL's configuration files; as in NCCL, the first line that names a variable counts."""
    first, *others = files
    found: dict[str, str] = {}
    for name in (environ.get("NCCL_CONF_FILE") or os.path.expanduser(first), *others):
        try:
            lines = Path(name).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # usually there is no such file
            continue
        for line in lines:
            key, equals, value = line.partition("=")
            if equals and not line.startswith("#"):
                found.setdefault(key, value)
    return found


def float32_row(device: torch.device, environ: Mapping[str, str]) -> Row:
    """Whether float32 products keep all bits on `device`, tested by one whose TF32 result differs, and the settings."""
    factor = torch.full((SIDE, SIDE), 1 + 2.0**-12, device=device)
    exact = bool((factor @ torch.ones_like(factor) == SIDE * (1 + 2.0**-12)).all())
    precision, override = torch.get_float32_matmul_precision(), environ.get("NVIDIA_TF32_OVERRIDE")
    about = ", ".join(
        [
            f"torch's precision is {precision}",
            *(f"{name}={environ[name]}" for name in TF32_VARIABLES if name in environ),
            *(["convolutions may use TF32"] if torch.backends.cudnn.allow_tf32 and override != "0" else []),
        ]
    )
    if not exact:
        return Row("float32 products", "warn", f"rounded to TF32 or less ({about})")
    if override not in (None, "0") or (precision != "highest" and override is None):
        return Row("float32 products", "warn", f"exact here, but a CUDA device may round them to TF32 ({about})")
    return Row("float32 products", "ok", f"exact ({about})")


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's share of its host: torch's threads, and the logical CPUs that it may run on."""

    host: str
    threads: int
    cpus: frozenset[int]

    @classmethod
    def of_this_rank(cls, host: str) -> Share:
        """The share that launcher and scheduler gave to this process."""
        return cls(host, torch.get_num_threads(), own_cpus())


def threads_row(mine: Share, ranks: Sequence[Share], environ: Mapping[str, str], *, offload: bool) -> Row:
    """Whether the ranks that share this rank's CPUs have at most as many threads as there are CPUs.

    offload: zero.offload_optimizer, with which AdamW runs on the host, on `host_threads` threads.
    """
    sharing = [share for share in ranks if share.host == mine.host and share.cpus & mine.cpus]
    cpus = len(frozenset[int]().union(*(share.cpus for share in sharing)))
    wanted, fair = sum(share.threads for share in sharing), max(1, cpus // len(sharing))
    value = environ.get("OMP_NUM_THREADS", "not set")
    among = "1 rank" if len(sharing) == 1 else f"{len(sharing)} ranks"
    text = f"{mine.threads} per rank (OMP_NUM_THREADS: {value}), {among} on {cpus} CPUs"
    stepping = host_threads(mine.cpus, [share.cpus for share in sharing], environ) or mine.threads
    if offload:
        text += f"; the offloaded step: {stepping}"
    if wanted > cpus:
        fix = f"set OMP_NUM_THREADS={fair}" if mine.threads > fair else "start fewer ranks, or give them more CPUs"
        return Row("threads", "warn", f"{text}: too many; {fix}")
    if offload and stepping == 1 < fair:
        return Row("threads", "warn", f"{text}: one core steps the offloaded optimizer; set OMP_NUM_THREADS={fair}")
    return Row("threads", "ok", text)


def _bad_on_cuda(device: torch.device) -> Result:
    """The result of a finding that matters on CUDA only."""
    return "warn" if device.type == "cuda" else "-"
