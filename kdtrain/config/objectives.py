"""What each objective needs: the one table that checks, the console, FLOPs and jobs/build read. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from kdtrain.config.schema import ObjectiveSection


@dataclass(frozen=True, slots=True)
class ObjectiveTraits:
    """Needs of an objective.

    signals: kinds of a teacher's signal that it can use, rows of `losses.matrix.TARGETS`; empty: none in a step.
    """

    signals: tuple[str, ...] = ()

    @property
    def needs_teacher(self) -> bool:
        """Whether a step needs a teacher's signal."""
        return bool(self.signals)


OBJECTIVES = {
    "pretrain": ObjectiveTraits(),
    "distill": ObjectiveTraits(signals=("dense",)),
}
"""Value of objective.name -> its traits."""


def traits_of(objective: ObjectiveSection) -> ObjectiveTraits:
    """Of the objective that objective.name names."""
    return OBJECTIVES[objective.name]


def without_teacher() -> str:
    """Settings for a run without a teacher, as the fix of a message: "objective.name=pretrain"."""
    return " or ".join(f"objective.name={name}" for name, traits in OBJECTIVES.items() if not traits.needs_teacher)
