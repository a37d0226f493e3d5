"""Every setting of a run, one module per section. Standard library only.

The string below a field is its documentation: `kdtrain.config.explain` reads it from the source. Sizes are in tokens
unless the name has another unit. `None` means "chosen automatically" or "off", as documented.
"""

from kdtrain.config.schema.checkpoint import CheckpointSection
from kdtrain.config.schema.data import DataSection
from kdtrain.config.schema.debug import DebugSection
from kdtrain.config.schema.eval import EvalSection
from kdtrain.config.schema.guard import GuardSection
from kdtrain.config.schema.log import LogSection, WandbSection
from kdtrain.config.schema.objective import (
    DistillObjective,
    Divergence,
    ObjectiveSection,
    ObjectiveSettings,
    PretrainObjective,
)
from kdtrain.config.schema.optim import OptimSection
from kdtrain.config.schema.parallel import ParallelSection
from kdtrain.config.schema.run import RunSection
from kdtrain.config.schema.run_config import RunConfig
from kdtrain.config.schema.schedule import ScheduleSection
from kdtrain.config.schema.student import StudentSection
from kdtrain.config.schema.teacher import Quantization, TeacherSection
from kdtrain.config.schema.train import TrainSection
from kdtrain.config.schema.types import Attention, Dtype
from kdtrain.config.schema.zero import ZeroSection

__all__ = [
    "Attention",
    "CheckpointSection",
    "DataSection",
    "DebugSection",
    "DistillObjective",
    "Divergence",
    "Dtype",
    "EvalSection",
    "GuardSection",
    "LogSection",
    "ObjectiveSection",
    "ObjectiveSettings",
    "OptimSection",
    "ParallelSection",
    "PretrainObjective",
    "Quantization",
    "RunConfig",
    "RunSection",
    "ScheduleSection",
    "StudentSection",
    "TeacherSection",
    "TrainSection",
    "WandbSection",
    "ZeroSection",
]
