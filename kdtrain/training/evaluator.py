"""Validation during a run: fixed batches, one record, one console line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from kdtrain.batch import Batch
from kdtrain.engine.zero import StudentEngine
from kdtrain.evaluation.validation import Validation
from kdtrain.training.progress import Progress
from kdtrain.training.report import Reporter


class Evaluator:
    """Runs a `Validation` over the same batches each time and reports the means."""

    def __init__(
        self,
        validation: Validation,
        engine: StudentEngine,
        batches: Callable[[], Iterator[Batch]],
        reporter: Reporter,
        device: torch.device,
    ) -> None:
        self._validation = validation
        self._engine = engine
        self._batches = batches
        self._reporter = reporter
        self._device = device

    def run(self, progress: Progress) -> dict[str, float]:
        """Evaluate the current student. Communicates as `Validation.run`."""
        started = time.perf_counter()
        with self._engine.eval_mode():
            means = self._validation.run(self._batches(), self._device)
        self._reporter.evaluation(progress, means, time.perf_counter() - started)
        return means
