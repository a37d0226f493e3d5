"""The checkpoints of a run: writing, keeping, loading. Their format is `kdtrain.engine.checkpoint`'s."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kdtrain.batch import BatchSource
from kdtrain.config.schema import CheckpointSection
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import checkpoint
from kdtrain.engine.background import BackgroundWriter
from kdtrain.engine.commit import remove_older
from kdtrain.engine.zero import StudentEngine
from kdtrain.log import LOGGER
from kdtrain.training.config_changes import config_changes
from kdtrain.training.progress import Progress
from kdtrain.training.run_files import CHECKPOINTS, VOCAB_SIZE

NEW_IN_A_STAGE = ("data.", "schedule.", "train.")
"""Sections that a new stage usually changes: their changes are not reported one by one."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A checkpoint that a run starts from.

    path: its folder. origin: the checkpoint that run.resume=PATH or run.continue_from named when the run was started;
    None for a run from scratch. is_stage: load only the student and the optimizer's state, for a new stage of training.
    """

    path: Path
    origin: dict[str, Any] | None
    is_stage: bool = False


class Checkpoints:
    """Writes and reads a run's checkpoints: model, optimizer, data position, progress, configuration, origin.

    No random state is kept: each step seeds its random numbers from (run.seed, step, data rank). Every rank holds one
    and calls the same methods at the same steps.
    """

    def __init__(
        self,
        settings: CheckpointSection,
        run_folder: Path,
        mesh: Mesh,
        device: torch.device,
        *,
        config: Mapping[str, Any],
        origin: dict[str, Any] | None = None,
    ) -> None:
        """config: of the run, as plain nested values, saved in each checkpoint. origin: of its `ResumePoint`."""
        self._root = run_folder / CHECKPOINTS
        self._settings = settings
        self._config = config
        self._mesh = mesh
        self._origin = origin
        self._last: Path | None = None
        self._writer = BackgroundWriter(mesh, device) if settings.async_write else None
        self._began = self._stalled = 0.0

    def save(
        self, engine: StudentEngine, progress: Progress, data_state: Mapping[str, Any], *, wait: bool = True
    ) -> None:
        """Write one complete checkpoint, then remove those that checkpoint.keep_* do not keep.

        data_state: of the batch source after the steps of `progress`. wait: return only when it is on disk; otherwise,
        with checkpoint.async_write, once it has been copied to the host (see `advance`). Writes nothing if this step
        has been saved already. Communicates: barriers and success flags. Raises CheckpointError on all ranks.
        """
        began = time.perf_counter()
        self.wait()
        if self._last is None or self._last.name != checkpoint.folder_name(progress.step):
            self._began = began
            self._last = self._write(engine, progress.step, self._state(engine, progress, data_state))
            self._stalled = time.perf_counter() - began
        if wait:
            self.wait()

    @property
    def busy(self) -> bool:
        """Whether this rank's background write has not reached its next stage (see `advance`). Does not communicate."""
        return self._writer is not None and self._writer.busy

    def advance(self) -> None:
        """Move a checkpoint that is being written to its next stage. Call it when no rank is `busy`.

        Communicates success flags, only while one is being written. Raises CheckpointError on all ranks if writing
        failed on any.
        """
        if self._writer is not None and (path := self._writer.advance()) is not None:
            self._log_saved(path)

    def wait(self) -> None:
        """Block until a checkpoint that is being written is on disk. Communicates and raises as `advance`."""
        while self._writer is not None and self._writer.in_flight is not None:
            self.advance()

    def _write(self, engine: StudentEngine, step: int, state: dict[str, Any]) -> Path:
        keep = self._settings
        if self._writer is not None:

            def tidy(saved: Path) -> None:
                remove_older(self._root, keep.keep_last, keep.keep_every, saved)

            return checkpoint.save_async(self._writer, self._root, engine, step=step, state=state, prune=tidy)
        path = checkpoint.save(self._root, engine, step=step, state=state)
        checkpoint.retain(self._root, keep.keep_last, keep_every=keep.keep_every, just_saved=path, mesh=self._mesh)
        self._stalled = 0.0
        self._log_saved(path)
        return path

    def _state(self, engine: StudentEngine, progress: Progress, data_state: Mapping[str, Any]) -> dict[str, Any]:
        return {
            VOCAB_SIZE: engine.backbone.shard.vocab_size,
            "progress": asdict(progress),
            "loader": dict(data_state),
            "config": dict(self._config),
            "origin": self._origin,
        }

    def _log_saved(self, path: Path) -> None:
        if self._mesh.is_main:
            seconds = time.perf_counter() - self._began
            text = "saved %7d  %s  %.2f GiB in %.1f s"
            values = (checkpoint.step_of(path), path, checkpoint.size_bytes(path) / 2**30, seconds)
            if self._writer is None:
                LOGGER.info(text, *values)
            else:
                LOGGER.info(text + ", training waited %.2f s", *values, self._stalled)

    def load(self, point: ResumePoint, engine: StudentEngine, loader: BatchSource) -> Progress:
        """Restore engine, data position and progress from a checkpoint of any layout.

        For a new stage only the engine: its data position, steps and tokens begin at 0. Warns of changed settings that
        change what is learned. Communicates as `kdtrain.engine.checkpoint.load`.
        """
        state = checkpoint.load(point.path, engine)
        if not point.is_stage:
            loader.load_state_dict(state["loader"])
        former = state.get("config")
        if former is None:  # the first checkpoints lack it
            blend = (
                "; it is of a version that may have blended several stores in another order: with several, this run "
                "may repeat some text and leave some out"
            )
            text = "%s has no configuration to compare with that of this run%s"
            LOGGER.warning(text, point.path, "" if point.is_stage else blend)
        for change in [] if former is None else config_changes(former, self._config):
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
