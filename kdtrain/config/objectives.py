"""What each objective is and needs: the one table that checks, FLOPs and jobs/build read. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdtrain.config.schema import ObjectiveSection


@dataclass(frozen=True, slots=True)
class ObjectiveTraits:
    """An objective's class and needs.

    implementation: "module:Class" in kdtrain.objectives, imported when a run is built; constructed as
    `kdtrain.objectives.base.ObjectiveClass`. signals: kinds of a teacher's signal that it can use, rows of
    `losses.matrix.TARGETS`; empty: none in a step. batches: what a step trains on; tokens: packed sequences of
    data.train.
    """

    implementation: str
    signals: tuple[str, ...] = ()
    batches: Literal["tokens"] = "tokens"

    @property
    def needs_teacher(self) -> bool:
        """Whether a step needs a teacher's signal."""
        return bool(self.signals)


OBJECTIVES = {
    "pretrain": ObjectiveTraits("kdtrain.objectives.pretrain:Pretrain"),
    "distill": ObjectiveTraits("kdtrain.objectives.distill:Distill", signals=("dense",)),
}
"""Value of objective.name -> its traits."""


def traits_of(objective: ObjectiveSection) -> ObjectiveTraits:
    """Of the objective that objective.name names."""
    return OBJECTIVES[objective.name]


def without_teacher() -> str:
    """Settings for a run without a teacher, as the fix of a message: "objective.name=pretrain"."""
    return " or ".join(f"objective.name={name}" for name, traits in OBJECTIVES.items() if not traits.needs_teacher)
