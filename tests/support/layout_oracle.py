"""The three steps of `layout_steps` in plain torch: whole logits, autograd, torch's AdamW, one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.slices import CheckpointReader
from kdtrain.losses.reference import skew_kl
from kdtrain.models.backbone import Backbone
from tests.support import layout_steps as given

ERRORS = ("loss", "norm", "gradient", "weight", "evaluation")
LIMITS: dict[str, dict[str, float]] = {
    "float32": dict.fromkeys((*ERRORS, "later"), 1e-5),
    "bfloat16": {"loss": 1e-3, "norm": 3e-3, "later": 2e-2, "gradient": 1.5, "weight": 3e-2, "evaluation": 5e-3},
}
"""Largest error by dtype.

later: of losses and norms after step 1, when weights have been rounded. A gradient's in bfloat16 is a multiple of what
rounding does to plain torch in one process.
"""


Answer = tuple[list[tuple[float, float]], float]
"""(loss and gradient norm of each step, an evaluation)"""


class NamedCase(Protocol):
    """A layout: `layout_steps.Case`, or another with a name and the student's dtype."""

    @property
    def name(self) -> str:
        """As in messages."""

    @property
    def dtype(self) -> str:
        """The student's: "float32" or "bfloat16"."""


@dataclass(slots=True)
class Oracle:
    """Per step loss and norm, step 1's clipped gradients, the final weights and evaluation.

    rounding: by how much, relatively, step 1's worst gradient differs when the student is in bfloat16.
    """

    steps: list[tuple[float, float]]
    grads: dict[str, Tensor]
    weights: dict[str, Tensor]
    evaluation: float
    rounding: float

    def limits(self, dtype: str) -> dict[str, float]:
        """The largest error of each kind."""
        limits = LIMITS[dtype]
        return limits if dtype == "float32" else {**limits, "gradient": limits["gradient"] * self.rounding}


def logits_of(backbone: Backbone, batch: Batch) -> Tensor:
    """[tokens, VOCAB] in float32."""
    return F.linear(backbone.hidden_states(batch), backbone.lm_head_shard.weight[: given.VOCAB]).float()


def loss_of(backbone: Backbone, teacher: Backbone | None, batch: Batch) -> Tensor:
    """Nats per valid token: cross-entropy, or the mixture of `layout_steps.KD` with it and the z-loss."""
    logits = logits_of(backbone, batch)
    losses = F.cross_entropy(logits, batch.labels.flatten(), reduction="none")
    if teacher is not None:
        kd = skew_kl(logits, logits_of(teacher, batch), temperature=2.0, skew=0.3, dtype=torch.float32)
        losses = 0.7 * 4.0 * kd + 0.3 * losses + given.Z_LOSS * logits.logsumexp(-1).square()
    return (losses * batch.loss_mask.flatten()).sum() / batch.loss_mask.sum()


def rounding_error(
    folder: Path, family: str, teacher: Backbone | None, grads: dict[str, Tensor], device: torch.device = given.CPU
) -> float:
    """Worst relative error of a gradient, in the 2-norm, of one process of plain torch in bfloat16."""
    backbone = given.build_backbone(folder, family, Mesh(), dtype="bfloat16", device=device)
    loss_of(backbone, teacher, given.step_batch(1).to(device)).backward()
    torch.nn.utils.clip_grad_norm_(backbone.parameters(), given.MAX_NORM)
    named = backbone.hf_parameters()
    errors = [(name, relative_error(p.grad if p.grad is None else p.grad.cpu(), grads[name])) for name, p in named]
    return worst(errors)[0]


def oracle(
    folder: Path,
    family: str,
    distils: bool,
    teacher_of: Callable[[Path], Backbone] = given.whole_teacher,
    device: torch.device = given.CPU,
) -> Oracle:
    """The three steps of a student of this family, with a teacher or without one, on `device`; tensors on the CPU."""
    teacher = teacher_of(folder).to(device) if distils else None
    backbone = given.build_backbone(folder, family, Mesh(), device=device)
    named = dict(backbone.hf_parameters())
    matrices = [p for p in named.values() if p.dim() > 1]
    vectors = [p for p in named.values() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": given.WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=given.EPS)
    found = Oracle([], {}, {}, 0.0, 0.0)
    for step, rate in enumerate(given.RATES, 1):
        adam.zero_grad()
        loss = loss_of(backbone, teacher, given.step_batch(step).to(device))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), given.MAX_NORM)
        assert norm > 1.2 * given.MAX_NORM, "clipping would not be tested"
        found.steps.append((loss.item(), norm.item()))
        if step == 1:
            found.grads = {name: p.grad.clone().cpu() for name, p in named.items() if p.grad is not None}
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
    with torch.no_grad():
        found.evaluation = float(loss_of(backbone, teacher, given.step_batch(9).to(device)))
    found.weights = {name: param.detach().clone().cpu() for name, param in named.items()}
    found.rounding = rounding_error(folder, family, teacher, found.grads, device)
    return found


def errors_of(answer: Answer, want: Oracle, root: Path) -> dict[str, tuple[float, str]]:
    """Kind of error (ERRORS, "later") -> (the largest, what it is of). A NaN is the largest of all.

    answer: of `layout_steps.run_cases`; root: its checkpoints. loss, norm, evaluation: relative; later: the same of
    the steps after the first. gradient: of step 1, |gradient - reference| / |reference| in the 2-norm. weight:
    absolute, after three steps. AssertionError: other parameters than plain torch's, or one without a gradient to
    compare.
    """
    steps, evaluation = answer
    numbers = [
        (f"{kind} of step {number}", abs(value / right - 1))
        for number, (step, right_step) in enumerate(zip(steps, want.steps, strict=True), 1)
        for kind, value, right in zip(("loss", "norm"), step, right_step, strict=True)
    ]
    gradients, weights = parameter_errors(want, root)
    return {
        "loss": worst(numbers[:1]),
        "norm": worst(numbers[1:2]),
        "later": worst(numbers[2:]),
        "gradient": worst(gradients),
        "weight": worst(weights),
        "evaluation": worst([("evaluation", abs(evaluation / want.evaluation - 1))]),
    }


def relative_error(found: Tensor | None, right: Tensor) -> float:
    """|found - right| / |right| in the 2-norm; of no gradient at all: 1."""
    return 1.0 if found is None else float((found - right).norm() / right.norm())


def worst(found: list[tuple[str, float]]) -> tuple[float, str]:
    """(largest error, what it is of); a NaN is larger than all numbers, as for torch."""
    errors = torch.tensor([error for _, error in found])
    at = int(errors.argmax())
    return float(errors[at]), found[at][0]


def parameter_errors(want: Oracle, root: Path) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """(each gradient's error, each weight's)"""
    gradients, weights = [], []
    with CheckpointReader(root / "step_000001") as first, CheckpointReader(root / "step_000003") as last:
        assert sorted(first.names()) == sorted(want.weights), f"{root} holds other parameters than the plain model"
        for name in first.names():
            rows = first.manifest.parameters[name].shape[0]  # the rest is padding of a vocabulary
            gradient, right = first.read_full(name, "exp_avg") / (1 - 0.9), want.grads[name][:rows]
            assert right.norm() > 1e-3, f"{root.name}: {name} has no gradient to compare"
            gradients.append((f"gradient of {name}", relative_error(gradient, right)))
            error = float((last.read_full(name, "master") - want.weights[name][:rows]).abs().max())
            weights.append((f"{name} after three steps", error))
    return gradients, weights


def check_case(case: NamedCase, answer: Answer, want: Oracle, root: Path) -> None:
    """AssertionError unless all errors of one layout are within the limits of its dtype."""
    limits = want.limits(case.dtype)
    for kind, (error, where) in errors_of(answer, want, root).items():
        assert error <= limits[kind], f"{case.name}: {where} is off by {error:.1e}"
