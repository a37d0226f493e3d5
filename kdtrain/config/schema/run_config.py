"""The whole configuration: one field per section, in the order in which they are documented and checked."""

from __future__ import annotations

from dataclasses import dataclass, field

from kdtrain.config.schema.checkpoint import CheckpointSection
from kdtrain.config.schema.data import DataSection
from kdtrain.config.schema.debug import DebugSection
from kdtrain.config.schema.eval import EvalSection
from kdtrain.config.schema.guard import GuardSection
from kdtrain.config.schema.log import LogSection
from kdtrain.config.schema.objective import ObjectiveSection
from kdtrain.config.schema.optim import OptimSection
from kdtrain.config.schema.parallel import ParallelSection
from kdtrain.config.schema.run import RunSection
from kdtrain.config.schema.schedule import ScheduleSection
from kdtrain.config.schema.student import StudentSection
from kdtrain.config.schema.teacher import TeacherSection
from kdtrain.config.schema.train import TrainSection
from kdtrain.config.schema.zero import ZeroSection


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A whole run."""

    run: RunSection = field(default_factory=RunSection)
    """Identity and life of the run."""
    student: StudentSection = field(default_factory=StudentSection)
    """The trained model."""
    teacher: TeacherSection = field(default_factory=TeacherSection)
    """The frozen model."""
    data: DataSection = field(default_factory=DataSection)
    """Tokens."""
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    """What to learn."""
    parallel: ParallelSection = field(default_factory=ParallelSection)
    """Layout."""
    zero: ZeroSection = field(default_factory=ZeroSection)
    """DeepSpeed ZeRO."""
    optim: OptimSection = field(default_factory=OptimSection)
    """Optimizer."""
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    """Learning rate."""
    train: TrainSection = field(default_factory=TrainSection)
    """Length."""
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    """Resumable states."""
    eval: EvalSection = field(default_factory=EvalSection)
    """Validation."""
    log: LogSection = field(default_factory=LogSection)
    """Reports."""
    guard: GuardSection = field(default_factory=GuardSection)
    """Watching a long run."""
    debug: DebugSection = field(default_factory=DebugSection)
    """Fault finding."""
