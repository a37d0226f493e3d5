"""Problems of the settings that trade time or precision for device memory."""

from __future__ import annotations

from collections.abc import Iterator

from kdtrain.config.problems import Problem
from kdtrain.config.schema import RunConfig


def problems(cfg: RunConfig) -> Iterator[Problem]:
    """Problems that need nothing but the values."""
    yield from _offload_optimizer(cfg)


def _offload_optimizer(cfg: RunConfig) -> Iterator[Problem]:
    if cfg.zero.offload_optimizer and cfg.zero.stage == 0:
        yield Problem(
            "zero.offload_optimizer", True, "would be ignored: zero.stage = 0 steps the weights where they are",
            "use zero.stage=1, or set zero.offload_optimizer=false",
        )  # fmt: skip
