"""Which checkpoints a run writes and keeps; the format is `kdtrain.engine.checkpoint`'s."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kdtrain.config.schema import RunConfig
from kdtrain.data.loader import StepLoader
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import checkpoint
from kdtrain.engine.background import BackgroundWriter
from kdtrain.engine.commit import remove_older
from kdtrain.engine.zero import StudentEngine
from kdtrain.log import LOGGER
from kdtrain.training.export import VOCAB_SIZE
from kdtrain.training.progress import Progress
from kdtrain.training.resume import FOLDER, ResumePoint, config_changes, saved_config

NEW_IN_A_STAGE = ("data.", "schedule.", "train.")
"""Settings that a new stage is made for: their changes are not reported one by one."""


class Checkpoints:
    """Writes and reads a run's checkpoints: model, optimizer, data position, progress, configuration, origin.

    No random state is kept: what is random in a step is seeded from (run.seed, step, the rank's tokens) when it begins.
    """

    def __init__(
        self, cfg: RunConfig, run_folder: Path, mesh: Mesh, device: torch.device, origin: dict[str, Any] | None = None
    ) -> None:
        self._root = run_folder / FOLDER
        self._cfg = cfg
        self._mesh = mesh
        self._origin = origin
        self._last: Path | None = None
        self._writer = BackgroundWriter(mesh, device) if cfg.checkpoint.async_write else None
        self._began = self._stalled = 0.0

    def save(
        self, engine: StudentEngine, progress: Progress, loader: StepLoader, sequences: int, *, wait: bool = True
    ) -> None:
        """One complete checkpoint, then those that checkpoint.keep_* do not keep are removed. Every rank must call it.

        sequences: consumed so far by the whole run. wait: return only when it is on disk; else, with
        checkpoint.async_write, once it has been copied (see `advance`). Writes nothing if this step has been saved
        already. Communicates: barriers and success flags. Raises CheckpointError on all ranks.
        """
        began = time.perf_counter()
        self.finish()
        if self._last is None or self._last.name != checkpoint.folder_name(progress.step):
            self._began = began
            self._last = self._write(engine, progress.step, self._state(engine, progress, loader, sequences))
            self._stalled = time.perf_counter() - began
        if wait:
            self.finish()

    @property
    def busy(self) -> bool:
        """Whether this rank is writing in the background and not ready for `advance`. Does not communicate."""
        return self._writer is not None and self._writer.busy

    def advance(self) -> None:
        """Go on with the checkpoint that is being written, if one is. Every rank must call it, when none is `busy`.

        Communicates, only then: success flags. Raises CheckpointError on all ranks if writing failed on any.
        """
        if self._writer is not None and (path := self._writer.advance()) is not None:
            self._tell(path)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is on disk. Every rank must call it. Raises as `advance`."""
        while self._writer is not None and self._writer.in_flight is not None:
            self.advance()

    def _write(self, engine: StudentEngine, step: int, state: dict[str, Any]) -> Path:
        keep = self._cfg.checkpoint
        if self._writer is not None:

            def tidy(saved: Path) -> None:
                remove_older(self._root, keep.keep_last, keep.keep_every, saved)

            return checkpoint.save_async(self._writer, self._root, engine, step=step, state=state, prune=tidy)
        path = checkpoint.save(self._root, engine, step=step, state=state)
        checkpoint.retain(self._root, keep.keep_last, keep_every=keep.keep_every, just_saved=path, mesh=self._mesh)
        self._stalled = 0.0
        self._tell(path)
        return path

    def _state(self, engine: StudentEngine, progress: Progress, loader: StepLoader, sequences: int) -> dict[str, Any]:
        return {
            VOCAB_SIZE: engine.backbone.shard.vocab_size,
            "progress": asdict(progress),
            "loader": loader.state_dict(sequences),
            "config": saved_config(self._cfg),
            "origin": self._origin,
        }

    def _tell(self, path: Path) -> None:
        if self._mesh.is_main:
            seconds = time.perf_counter() - self._began
            text = "saved %7d  %s  %.2f GiB in %.1f s"
            values = (checkpoint.step_of(path), path, checkpoint.size_bytes(path) / 2**30, seconds)
            if self._writer is None:
                LOGGER.info(text, *values)
            else:
                LOGGER.info(text + ", training waited %.2f s", *values, self._stalled)

    def load(self, point: ResumePoint, engine: StudentEngine, loader: StepLoader) -> Progress:
        """Bring engine and data position to where the checkpoint was written; any layout. Every rank calls it.

        Of a new stage only the engine: its data, steps and tokens begin anew. Settings that have changed since, and
        change what is learned, are named in warnings.
        """
        state = checkpoint.load(point.path, engine)
        if not point.is_stage:
            loader.load_state_dict(state["loader"])
        for change in config_changes(state["config"], saved_config(self._cfg)):
            if not (point.is_stage and change.startswith(NEW_IN_A_STAGE)):
                LOGGER.warning("changed since %s was written: %s", point.path.name, change)
        before = Progress(**state["progress"])
        if not point.is_stage:
            LOGGER.info("resumed %6d  from %s", before.step, point.path)
            return before
        text = (
            "stage    from %s (step %d, %s tokens): took weights, AdamW's moments and step counts; steps, tokens, "
            "learning-rate schedule and data position begin at 0"
        )
        LOGGER.info(text, point.path, before.step, f"{before.tokens_seen:,}")
        return Progress()
