"""The objective of a run, and what its tokens cost in arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdtrain.batch import Batch
from kdtrain.config.objectives import traits_of
from kdtrain.config.ranks import teacher_ranks
from kdtrain.config.schema import ObjectiveSection, RunConfig
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.zero import StudentEngine
from kdtrain.errors import ConfigError
from kdtrain.jobs.build.models import Models
from kdtrain.models.flops import forward_flops_per_token, peak_flops, training_flops_per_token
from kdtrain.objectives.base import Objective
from kdtrain.objectives.distill import Distill
from kdtrain.objectives.pretrain import Pretrain
from kdtrain.teacher.signal import DenseSignal
from kdtrain.teacher.source import TeacherSource
from kdtrain.training.report import Costs
from kdtrain.training.timing import PhaseTimer


class TimedTeacher:
    """A TeacherSource whose calls are timed under the phase "teacher"."""

    def __init__(self, teacher: TeacherSource, timer: PhaseTimer) -> None:
        self._teacher = teacher
        self._timer = timer

    def begin_step(self, micro_batches: Sequence[Batch]) -> None:
        """As the wrapped teacher's."""
        with self._timer.phase("teacher"):
            self._teacher.begin_step(micro_batches)

    def signal(self, batch: Batch) -> DenseSignal:
        """As the wrapped teacher's."""
        with self._timer.phase("teacher"):
            return self._teacher.signal(batch)


def build_objective(cfg: RunConfig, engine: StudentEngine, models: Models, timer: PhaseTimer) -> Objective:
    """The objective of objective.name. Raises ConfigError if it needs a teacher and there is none."""
    name = cfg.objective.name
    if traits_of(cfg.objective).needs_teacher and models.teacher is None:
        raise ConfigError(f"objective.name = {name} needs a teacher\n  fix: set teacher.weights to a model folder")
    return BUILDERS[name](cfg.objective, engine, models, timer)


def _pretrain(settings: ObjectiveSection, engine: StudentEngine, models: Models, timer: PhaseTimer) -> Objective:
    return Pretrain(engine, models.layout, z_loss=settings.z_loss)


def _distill(settings: ObjectiveSection, engine: StudentEngine, models: Models, timer: PhaseTimer) -> Objective:
    assert models.teacher is not None  # `build_objective` has refused it
    teacher = TimedTeacher(models.teacher, timer)
    return Distill(engine, teacher, settings.distill, models.layout, z_loss=settings.z_loss)


BUILDERS = {"pretrain": _pretrain, "distill": _distill}
"""Value of objective.name -> what builds it, a row for each of `config.objectives.OBJECTIVES`."""


def costs_of(cfg: RunConfig, models: Models, mesh: Mesh, device: torch.device) -> Costs:
    """FLOPs per token of both models, counting the experts that one token activates, and the devices' peak FLOP/s."""
    student, info, seq_len = models.student, models.teacher_info, cfg.data.seq_len
    teacher = 0.0
    if traits_of(cfg.objective).needs_teacher and info is not None:
        teacher = forward_flops_per_token(info.config, info.num_active_parameters, seq_len)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Costs(
        training_flops_per_token(student.config, student.num_parameters(), seq_len),
        teacher,
        None if peak is None else peak * (mesh.world_size + teacher_ranks(cfg)),
    )
