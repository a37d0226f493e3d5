"""Section objective: what the student learns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "alpha_beta", "logit_mse"]
TEMPERATURES = (0.01, 100.0)
"""Outside this range a float32 softmax is one-hot or uniform."""
LEAST_EXPONENT = 0.01
_EXPONENTS = "the limits (1, 0) and (0, 1) are the two KLs"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterOf:
    """What a parameter of some divergences may be. Its ends are excluded, because they are other divergences.

    divergences: those that read it. low, high: the open interval of its values. least_size: they are at least this
    large in size. sum_with: another parameter, with which its sum is above 0. fix: ends the message about a value.
    """

    divergences: tuple[str, ...]
    low: float = -math.inf
    high: float = math.inf
    least_size: float = 0.0
    sum_with: str = ""
    fix: str


def _parameter(default: float, of: ParameterOf) -> Any:
    return field(default=default, metadata={"parameter": of})


def parameters(section: Any) -> dict[str, ParameterOf]:
    """Field of a section -> what it may be, for those that are parameters of divergences."""
    return {of.name: of.metadata["parameter"] for of in fields(section) if "parameter" in of.metadata}


class ObjectiveSettings:
    """The section of one objective. Its methods are called only if objective.name names it."""

    __slots__ = ()

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """(field, what is wrong, how to mend it) of every wrong setting: ("gamma", "is negative", "2 is usual")."""
        return iter(())

    def loss_line(self) -> str:
        """The loss for the console, without the z-loss; by default the fields and their values."""
        owner: Any = self
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(owner))


@dataclass(kw_only=True, slots=True)
class PretrainObjective(ObjectiveSettings):
    """Plain next-token cross-entropy. Has no settings."""

    def loss_line(self) -> str:
        """The loss for the console."""
        return "cross-entropy"


@dataclass(kw_only=True, slots=True)
class DistillObjective(ObjectiveSettings):
    """kd_weight * temperature^2 * D(teacher, student) + (1 - kd_weight) * cross-entropy, summed over valid tokens."""

    divergence: Divergence = "forward_kl"
    """forward_kl is KL(teacher || student); reverse_kl is KL(student || teacher); jsd is divided by
    teacher_share * (1 - teacher_share); logit_mse compares centred logits."""
    temperature: float = 1.0
    """Divides both models' logits in the divergence, whose value is multiplied by its square. Not in the CE."""
    kd_weight: float = 0.5
    """Weight of the divergence, in [0, 1]; the cross-entropy on the data gets 1 - kd_weight."""
    teacher_share: float = _parameter(
        0.5, ParameterOf(divergences=("jsd",), low=0, high=1, fix="its ends are forward_kl, reverse_kl")
    )
    """jsd: share b of the teacher in the mixture b p + (1 - b) q, in (0, 1)."""
    skew: float = _parameter(
        0.1,
        ParameterOf(
            divergences=("skew_kl", "skew_reverse_kl"),
            low=0,
            high=1,
            fix="0.1 is usual; at 0 it is forward_kl or reverse_kl",
        ),
    )
    """skew_kl: KL(p || skew p + (1 - skew) q); skew_reverse_kl: KL(q || (1 - skew) p + skew q). In (0, 1)."""
    ab_alpha: float = _parameter(
        0.5, ParameterOf(divergences=("alpha_beta",), least_size=LEAST_EXPONENT, fix=_EXPONENTS)
    )
    """alpha_beta: exponent of the teacher; at least 0.01 in size, and ab_alpha + ab_beta above 0."""
    ab_beta: float = _parameter(
        0.5,
        ParameterOf(divergences=("alpha_beta",), least_size=LEAST_EXPONENT, sum_with="ab_alpha", fix=_EXPONENTS),
    )
    """alpha_beta: exponent of the student; at least 0.01 in size."""

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Of weight and temperature; parameters of divergences carry their ranges."""
        if not 0 <= self.kd_weight <= 1:
            yield "kd_weight", "is not in [0, 1]", "it is a mixing weight, 0.5 mixes evenly"
        low, high = TEMPERATURES
        if not low <= self.temperature <= high:
            yield "temperature", f"is not in [{low:g}, {high:g}]", "1 is usual, 2 softens"

    def loss_line(self) -> str:
        """Both parts of the loss with their weights."""
        divergence = f"{self.divergence}, temperature {self.temperature:g}, weight {self.kd_weight:g}"
        return f"{divergence}; ce weight {1 - self.kd_weight:g}"


@dataclass(kw_only=True, slots=True)
class ObjectiveSection:
    """What the student learns. Only the section named by `name` may be set."""

    name: Literal["pretrain", "distill"] = "distill"
    """pretrain: cross-entropy alone. distill: divergence from a teacher that runs along, plus cross-entropy."""
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of the student's logits, per valid token; 1e-4 is usual, 0: none."""
    pretrain: PretrainObjective = field(default_factory=PretrainObjective)
    """Settings of objective pretrain."""
    distill: DistillObjective = field(default_factory=DistillObjective)
    """Settings of objective distill."""
