"""Where a run goes on from, and what has changed since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdtrain.config.schema import RunConfig
from kdtrain.engine import checkpoint
from kdtrain.errors import CheckpointError, ConfigError
from kdtrain.log import LOGGER

FOLDER = "checkpoints"
"""Inside the run folder."""

LAYOUT_ONLY = (
    *("run", "parallel", "zero", "log", "eval", "checkpoint", "debug"),
    *("guard.spike_sigmas", "guard.stall_warn_s", "guard.stall_exit_s", "guard.data_wait_share"),
    *(
        "student.attention",
        "student.activation_checkpointing",
        "student.allow_unused_weights",
        "teacher.attention",
        "teacher.allow_unused_weights",
        "teacher.layout",
        "teacher.tp",
        "teacher.ranks",
        "teacher.in_flight",
        "teacher.zero_stage",
        "teacher.offload",
        "teacher.max_tokens_per_forward",
        "teacher.overlap",
    ),
    *("data.sequences_per_micro_batch", "data.prefetch", "data.validation", "train.slab_bytes", "train.kernels"),
    *("data.sequence_prefix", "data.allow_worse_prefix"),
)
"""Sections and keys that change where and how fast a run computes, not what it learns (beyond rounding); and how the
sequence prefix was chosen: a resumed run has the one of its checkpoint, or is refused."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """path: the checkpoint to load. origin: what run.resume=PATH the run began with, None for one from scratch."""

    path: Path
    origin: dict[str, Any] | None


def find_resume_point(cfg: RunConfig, run_folder: Path) -> ResumePoint | None:
    """The checkpoint to continue from, by run.resume; None to start afresh. Reads only the file system.

    auto: the newest good one of this run folder. never: none may be there. A path starts a run from that checkpoint;
    once the run has checkpoints of its own it continues from its newest, so that the same command resumes it.
    Raises ConfigError when run.resume contradicts what the folder holds, CheckpointError when no good checkpoint is
    where one must be.
    """
    root = run_folder / FOLDER
    own = checkpoint.find_latest(root)
    if own is None and checkpoint.any_folder(root):
        raise CheckpointError(
            f"{root} holds checkpoints, and none of them is complete (the lines above say why)\n"
            "  why: starting afresh would throw away what they were written for\n"
            "  fix: start from a good checkpoint elsewhere under another run.name (run.resume=PATH), or remove them"
        )
    if cfg.run.resume == "auto":
        return None if own is None else ResumePoint(own, checkpoint.read_state(own).get("origin"))
    if cfg.run.resume == "never":
        if own is not None:
            raise ConfigError(
                f"{own} exists, but run.resume = never\n"
                "  why: starting afresh would overwrite a run's checkpoints\n"
                "  fix: choose another run.name, remove the run folder, or set run.resume=auto"
            )
        return None
    return _from_path(Path(cfg.run.resume), own)


def _from_path(named: Path, own: Path | None) -> ResumePoint:
    origin = None if own is None else checkpoint.read_state(own).get("origin")
    if own is not None and origin is not None and str(named.resolve()) in (origin["named"], origin["path"]):
        # Where the run began may have moved on since, or be gone: the run does not need it any more.
        LOGGER.info("run.resume = %s is where this run began; it continues from its own %s", named, own.name)
        return ResumePoint(own, origin)
    found = named if checkpoint.is_complete(named) else checkpoint.find_latest(named / FOLDER)
    if found is None:
        raise CheckpointError(
            f"run.resume = {named}: no complete checkpoint there\n"
            "  fix: give a folder step_NNNNNN, or a run folder that has one under checkpoints/"
        )
    found = found.resolve()
    identity = {
        "named": str(named.resolve()),
        "path": str(found),
        "id": checkpoint.identity(found),
        "step": checkpoint.step_of(found),
    }
    if own is None:
        return ResumePoint(found, identity)
    if own.resolve() == found or (origin is not None and origin["id"] == identity["id"]):
        return ResumePoint(own, origin)
    if own.resolve().parent == found.parent:
        raise ConfigError(
            f"run.resume = {named} is an older checkpoint of this very run, whose newest is {own}\n"
            "  why: the newer one would win at the next resume; two histories in one folder cannot be told apart\n"
            f"  fix: to go back to step {identity['step']}, choose another run.name and keep run.resume; to continue "
            "from the newest, set run.resume=auto"
        )
    began = "from scratch" if origin is None else f"from {origin['path']}"
    raise ConfigError(
        f"run.resume = {named} (step {identity['step']}), but this run folder holds {own}\n"
        f"  of a run that began {began}\n"
        "  why: two histories in one folder could not be told apart, and the newer would win at the next resume\n"
        "  fix: choose another run.name, or set run.resume=auto to continue the run that is here"
    )


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines "key: old -> new" for settings that change what is learned. Both: plain nested configurations."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    keys = [key for key in {**old, **new} if not any(key == s or key.startswith(f"{s}.") for s in LAYOUT_ONLY)]
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", list(value) if isinstance(value, tuple) else value))
    return found


def saved_config(cfg: RunConfig) -> dict[str, Any]:
    """The configuration as it is kept in a checkpoint's state."""
    return asdict(cfg)
