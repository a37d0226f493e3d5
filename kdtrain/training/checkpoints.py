"""Which checkpoints a run writes and keeps; the format is `kdtrain.engine.checkpoint`'s."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdtrain.config.schema import RunConfig
from kdtrain.data.loader import StepLoader
from kdtrain.engine import checkpoint
from kdtrain.engine.zero import StudentEngine
from kdtrain.log import LOGGER
from kdtrain.training.progress import Progress
from kdtrain.training.resume import FOLDER, config_changes, saved_config


class Checkpoints:
    """Writes and reads a run's checkpoints: model, optimizer, data position, progress, configuration, origin.

    No random state is kept: what is random in a step is seeded from (run.seed, step, data rank) when it begins.
    """

    def __init__(self, cfg: RunConfig, run_folder: Path, origin: dict[str, Any] | None = None) -> None:
        self._root = run_folder / FOLDER
        self._cfg = cfg
        self._origin = origin
        self._last: Path | None = None

    def save(self, engine: StudentEngine, progress: Progress, loader: StepLoader, sequences: int) -> Path:
        """One complete checkpoint, then older ones beyond keep_last are removed. Every rank must call it.

        sequences: consumed so far by the whole run. Does nothing if this step has been saved already. Communicates:
        barriers and success flags.
        """
        if self._last is not None and self._last.name == checkpoint.folder_name(progress.step):
            return self._last
        started = time.perf_counter()
        state: dict[str, Any] = {
            "progress": asdict(progress),
            "loader": loader.state_dict(sequences),
            "config": saved_config(self._cfg),
            "origin": self._origin,
        }
        path = checkpoint.save(self._root, engine, step=progress.step, state=state)
        checkpoint.retain(self._root, self._cfg.checkpoint.keep_last, just_saved=path, mesh=engine.mesh)
        if engine.mesh.is_main:
            LOGGER.info(
                "saved %7d  %s  %.2f GiB in %.1f s",
                *(progress.step, path, checkpoint.size_bytes(path) / 2**30, time.perf_counter() - started),
            )
        self._last = path
        return path

    def load(self, path: Path, engine: StudentEngine, loader: StepLoader) -> Progress:
        """Bring engine and data position to where `path` was written; any layout. Every rank calls it.

        Settings that have changed since, and change what is learned, are named in warnings.
        """
        state = checkpoint.load(path, engine)
        loader.load_state_dict(state["loader"])
        for change in config_changes(state["config"], saved_config(self._cfg)):
            LOGGER.warning("changed since %s was written: %s", path.name, change)
        return Progress(**state["progress"])
