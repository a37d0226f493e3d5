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
    """The checkpoint to load, by run.resume and run.continue_from; None for a run from scratch.

    auto: the newest complete one of the run folder. never: the folder may hold none. A path, as run.continue_from with
    a new stage, starts the run from that checkpoint; once the run has checkpoints of its own, the same command resumes
    it from the newest of them. Reads the file system only.
    Raises ConfigError if run.resume contradicts the run folder, CheckpointError if a required checkpoint is missing or
    incomplete.
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
        # the named checkpoint may have been removed or followed by others since; the run does not need it any more
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
    """What a run stores about the checkpoint it started from; for a stage also its progress and its own origin."""
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
            f"run.resume = {named} is an older checkpoint of this run, whose newest is {own}\n"
            "  why: the next resume would load the newer one; two histories in one folder cannot be distinguished\n"
            f"  fix: to go back to step {identity['step']}, choose another run.name and keep run.resume; to continue "
            "from the newest, set run.resume=auto"
        )
    began = "from scratch" if origin is None else f"from {origin['path']}"
    stays = "run.resume=auto" if key == "run.resume" else "run.resume=auto and run.continue_from=null"
    return (
        f"{key} = {named} (step {identity['step']}), but this run folder holds {own}\n"
        f"  of a run that began {began}{' as a new stage' if origin and origin.get('is_stage') else ''}\n"
        "  why: two histories in one folder cannot be distinguished, and the next resume would load the newer\n"
        f"  fix: choose another run.name, or set {stays} to continue the run that is here"
    )


def _real(path: Path) -> str:
    """The path with links resolved. Unlike Path.resolve, it does not raise for a loop of links."""
    return os.path.realpath(path)
