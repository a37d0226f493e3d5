"""The settings of the student's engine."""

from __future__ import annotations

from dataclasses import dataclass

from kdtrain.config.schema import Dtype, OptimSection, ZeroSection


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The sections of a configuration that `StudentEngine` reads, and two values of others.

    dtype: of the student's weights and activations. sequences_per_micro_batch: per data rank.
    """

    zero: ZeroSection
    optim: OptimSection
    dtype: Dtype
    sequences_per_micro_batch: int
