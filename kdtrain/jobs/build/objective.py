"""The objective of a run, and what its tokens cost in arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdtrain.batch import Batch
from kdtrain.config.ranks import teacher_ranks
from kdtrain.config.schema import RunConfig
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
    """The objective of objective.name. Raises ConfigError for distill without a teacher."""
    if cfg.objective.name == "pretrain":
        return Pretrain(engine, models.layout, z_loss=cfg.objective.z_loss)
    if models.teacher is None:
        raise ConfigError("objective.name = distill needs a teacher\n  fix: set teacher.weights to a model folder")
    return Distill(
        engine, TimedTeacher(models.teacher, timer), cfg.objective.distill, models.layout, z_loss=cfg.objective.z_loss
    )


def costs_of(cfg: RunConfig, models: Models, mesh: Mesh, device: torch.device) -> Costs:
    """FLOPs per token of both models, counting the experts that one token activates, and the devices' peak FLOP/s."""
    student, info, seq_len = models.student, models.teacher_info, cfg.data.seq_len
    distils = cfg.objective.name == "distill" and info is not None
    teacher = forward_flops_per_token(info.config, info.num_active_parameters, seq_len) if distils and info else 0.0
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Costs(
        training_flops_per_token(student.config, student.num_parameters(), seq_len),
        teacher,
        None if peak is None else peak * (mesh.world_size + teacher_ranks(cfg)),
    )
