"""Which checkpoints a run writes, keeps and continues from; the format is `kdtrain.engine.checkpoint`'s."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kdtrain.config.schema import RunConfig
from kdtrain.data.loader import StepLoader
from kdtrain.engine import checkpoint
from kdtrain.engine.zero import StudentEngine
from kdtrain.errors import CheckpointError, ConfigError
from kdtrain.log import LOGGER
from kdtrain.training.progress import Progress

FOLDER = "checkpoints"
"""Inside the run folder."""


def find_resume_point(cfg: RunConfig, run_folder: Path) -> Path | None:
    """The checkpoint to continue from, by run.resume; None to start afresh. Reads only the file system.

    Raises ConfigError when run.resume=never meets checkpoints, or a named checkpoint newer ones of this run; and
    CheckpointError when a named path holds none.
    """
    newest = checkpoint.find_latest(run_folder / FOLDER)
    if cfg.run.resume == "auto":
        return newest
    if cfg.run.resume == "never":
        if newest is not None:
            raise ConfigError(
                f"{newest} exists, but run.resume = never\n"
                "  why: starting afresh would overwrite a run's checkpoints\n"
                "  fix: choose another run.name, remove the run folder, or set run.resume=auto"
            )
        return None
    named = Path(cfg.run.resume)
    found = named if (named / "checkpoint.json").is_file() else checkpoint.find_latest(named / FOLDER)
    if found is None:
        raise CheckpointError(
            f"run.resume = {named}: no complete checkpoint there\n"
            "  fix: give a folder step_NNNNNN, or a run folder that has one under checkpoints/"
        )
    if newest is not None and checkpoint.step_of(newest) > checkpoint.step_of(found):
        raise ConfigError(
            f"run.resume = {named} is step {checkpoint.step_of(found)}, but this run folder holds {newest}\n"
            "  why: the newest checkpoint counts, so a later automatic resume would leave what is trained now behind\n"
            "  fix: choose another run.name, or remove the newer checkpoints"
        )
    return found


class Checkpoints:
    """Writes and reads a run's checkpoints: model, optimizer, data position, progress, random state."""

    def __init__(self, cfg: RunConfig, run_folder: Path) -> None:
        self._root = run_folder / FOLDER
        self._keep_last = cfg.checkpoint.keep_last

    def save(self, engine: StudentEngine, progress: Progress, loader: StepLoader, sequences: int) -> Path:
        """One complete checkpoint, then older ones beyond keep_last are removed. Every rank must call it.

        sequences: consumed so far by the whole run. Communicates: barriers and a success flag.
        """
        started = time.perf_counter()
        state: dict[str, Any] = {
            "progress": asdict(progress),
            "loader": loader.state_dict(sequences),
            "rng": torch.get_rng_state().numpy().tobytes().hex(),
        }
        path = checkpoint.save(self._root, engine, step=progress.step, state=state)
        if engine.mesh.is_main:
            checkpoint.retain(self._root, self._keep_last)
            size = sum(file.stat().st_size for file in path.iterdir())
            LOGGER.info(
                "saved %7d  %s  %.2f GiB in %.1f s", progress.step, path, size / 2**30, time.perf_counter() - started
            )
        return path

    @staticmethod
    def load(path: Path, engine: StudentEngine, loader: StepLoader) -> Progress:
        """Bring engine, data position and random state to where `path` was written; any layout. Every rank calls it."""
        state = checkpoint.load(path, engine)
        loader.load_state_dict(state["loader"])
        random = bytes.fromhex(state["rng"])
        torch.set_rng_state(torch.frombuffer(bytearray(random), dtype=torch.uint8))
        return Progress(**state["progress"])
