"""The objective of a run, and what its tokens cost in arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch

from kdtrain.batch import Batch, BatchSource
from kdtrain.config.objectives import ObjectiveTraits, traits_of
from kdtrain.config.ranks import teacher_ranks
from kdtrain.config.schema import RunConfig
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.zero import StudentEngine
from kdtrain.errors import ConfigError
from kdtrain.jobs.build.models import Models
from kdtrain.models.flops import forward_flops_per_token, peak_flops, training_flops_per_token
from kdtrain.objectives.base import Objective, ObjectiveClass
from kdtrain.teacher.signal import TeacherSignal
from kdtrain.teacher.source import SignalSource
from kdtrain.training.report import Costs
from kdtrain.training.timing import PhaseTimer


class TimedTeacher:
    """A SignalSource whose calls in a step are timed under the phase "teacher"."""

    def __init__(self, source: SignalSource, timer: PhaseTimer) -> None:
        self._source = source
        self._timer = timer

    @property
    def kind(self) -> str:
        """As the wrapped source's."""
        return self._source.kind

    def check(self, batches: BatchSource) -> None:
        """As the wrapped source's."""
        self._source.check(batches)

    def prefetch(self, micro_batches: Sequence[Batch]) -> None:
        """As the wrapped source's."""
        with self._timer.phase("teacher"):
            self._source.prefetch(micro_batches)

    def signal(self, batch: Batch) -> TeacherSignal:
        """As the wrapped source's."""
        with self._timer.phase("teacher"):
            return self._source.signal(batch)


def build_objective(cfg: RunConfig, engine: StudentEngine, models: Models, timer: PhaseTimer) -> Objective:
    """The objective of objective.name. Raises ConfigError if it cannot use the run's source of signals, or has none."""
    section = cfg.objective
    traits = traits_of(section)
    source = _source_of(section.name, traits, models, timer) if traits.needs_teacher else None
    return objective_class(traits)(engine, source, getattr(section, section.name), models.layout, z_loss=section.z_loss)


def objective_class(traits: ObjectiveTraits) -> ObjectiveClass:
    """Import what `traits.implementation` names."""
    module, _, name = traits.implementation.partition(":")
    found: ObjectiveClass = getattr(import_module(module), name)
    return found


def _source_of(name: str, traits: ObjectiveTraits, models: Models, timer: PhaseTimer) -> SignalSource:
    source = models.teacher
    if source is None:
        raise ConfigError(f"objective.name = {name} needs a teacher\n  fix: set teacher.weights to a model folder")
    if source.kind not in traits.signals:
        raise ConfigError(
            f"objective.name = {name} cannot use {source.kind} signals, which this run's teacher gives\n"
            f"  why: it is defined for {', '.join(traits.signals)}\n"
            "  fix: choose another objective, or a teacher that gives one of these"
        )
    return TimedTeacher(source, timer)


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
