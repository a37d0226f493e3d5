"""The checkpoint that a run resumes from or continues, by run.resume and run.continue_from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdtrain.config.schema import RunConfig
from kdtrain.engine import checkpoint
from kdtrain.errors import CheckpointError, ConfigError
from kdtrain.log import LOGGER
from kdtrain.training.checkpoints import ResumePoint
from kdtrain.training.run_files import CHECKPOINTS


def find_resume_point(cfg: RunConfig, run_folder: Path) -> ResumePoint | None:
    """The checkpoint to continue from, by run.resume; None to start afresh. Reads only the file system.

    auto: the newest good one of this run folder. never: none may be there. A path starts a run from that checkpoint, as
    run.continue_from does with a new stage; once the run has checkpoints of its own it continues from its newest, so
    that the same command resumes it.
    Raises ConfigError when run.resume contradicts what the folder holds, CheckpointError when no good checkpoint is
    where one must be.
    """
    root = run_folder / CHECKPOINTS
    own = checkpoint.find_latest(root)
    if own is None and checkpoint.any_folder(root):
        raise CheckpointError(
            f"{root} holds checkpoints, and none of them is complete (the lines above say why)\n"
            "  why: starting afresh would throw away what they were written for\n"
            "  fix: start from a good checkpoint elsewhere under another run.name (run.resume=PATH), or remove them"
        )
    if cfg.run.resume == "never" and own is not None:
        raise ConfigError(
            f"{own} exists, but run.resume = never\n"
            "  why: starting afresh would overwrite a run's checkpoints\n"
            "  fix: choose another run.name, remove the run folder, or set run.resume=auto"
        )
    if cfg.run.continue_from is not None:
        return _from_path("run.continue_from", Path(cfg.run.continue_from), own)
    if cfg.run.resume in ("auto", "never"):
        return None if own is None else ResumePoint(own, checkpoint.read_state(own).get("origin"))
    return _from_path("run.resume", Path(cfg.run.resume), own)


def _from_path(key: str, named: Path, own: Path | None) -> ResumePoint:
    origin = None if own is None else checkpoint.read_state(own).get("origin")
    is_stage = key == "run.continue_from"
    same_kind = origin is not None and origin.get("is_stage", False) == is_stage
    if own is not None and origin is not None and same_kind and _real(named) in (origin["named"], origin["path"]):
        # Where the run began may have moved on since, or be gone: the run does not need it any more.
        LOGGER.info("%s = %s is where this run began; it continues from its own %s", key, named, own.name)
        return ResumePoint(own, origin)
    found = named if checkpoint.is_complete(named) else checkpoint.find_latest(named / CHECKPOINTS)
    if found is None:
        raise CheckpointError(
            f"{key} = {named}: no complete checkpoint there\n"
            "  fix: give a folder step_NNNNNN, or a run folder that has one under checkpoints/"
        )
    found = Path(_real(found))
    identity = _identity(named, found, is_stage=is_stage)
    if own is None:
        return ResumePoint(found, identity, is_stage)
    if (_real(own) == str(found) and not is_stage) or (same_kind and origin and origin["id"] == identity["id"]):
        return ResumePoint(own, origin)
    raise ConfigError(_two_histories(key, named, own, identity, origin))


def _identity(named: Path, found: Path, *, is_stage: bool) -> dict[str, Any]:
    """What a run keeps of the checkpoint it began with; of a stage also how far and from where that one had come."""
    identity = {
        "named": _real(named),
        "path": str(found),
        "id": checkpoint.identity(found),
        "step": checkpoint.step_of(found),
    }
    if not is_stage:
        return identity
    state = checkpoint.read_state(found)
    return identity | {"is_stage": True, "tokens_seen": state["progress"]["tokens_seen"], "origin": state.get("origin")}


def _two_histories(
    key: str, named: Path, own: Path, identity: Mapping[str, Any], origin: Mapping[str, Any] | None
) -> str:
    if Path(_real(own)).parent == Path(identity["path"]).parent and key == "run.resume":
        return (
            f"run.resume = {named} is an older checkpoint of this very run, whose newest is {own}\n"
            "  why: the newer one would win at the next resume; two histories in one folder cannot be told apart\n"
            f"  fix: to go back to step {identity['step']}, choose another run.name and keep run.resume; to continue "
            "from the newest, set run.resume=auto"
        )
    began = "from scratch" if origin is None else f"from {origin['path']}"
    stays = "run.resume=auto" if key == "run.resume" else "run.resume=auto and run.continue_from=null"
    return (
        f"{key} = {named} (step {identity['step']}), but this run folder holds {own}\n"
        f"  of a run that began {began}{' as a new stage' if origin and origin.get('is_stage') else ''}\n"
        "  why: two histories in one folder could not be told apart, and the newer would win at the next resume\n"
        f"  fix: choose another run.name, or set {stays} to continue the run that is here"
    )


def _real(path: Path) -> str:
    """Links followed. Not Path.resolve, which raises where links go in a circle."""
    return os.path.realpath(path)
