"""Every reason why a configuration cannot run, found before torch is imported and reported together.

The checks of a section are in the module of its name. Checks that concern several sections are in a module named after
what they check: texts, dedicated_teacher, context_parallel, paths. `check` is the one entrance.
"""

from __future__ import annotations

from kdtrain.config.checks.checkpoint import check_checkpoint
from kdtrain.config.checks.context_parallel import check_context_parallel
from kdtrain.config.checks.data import check_data, check_tokens_per_step
from kdtrain.config.checks.dedicated_teacher import check_dedicated_teacher
from kdtrain.config.checks.eval import check_eval
from kdtrain.config.checks.guard import check_guard
from kdtrain.config.checks.log import check_log
from kdtrain.config.checks.objective import check_objective
from kdtrain.config.checks.optim import check_optim
from kdtrain.config.checks.parallel import check_parallel
from kdtrain.config.checks.paths import check_paths
from kdtrain.config.checks.report import Report
from kdtrain.config.checks.run import check_run
from kdtrain.config.checks.schedule import check_schedule
from kdtrain.config.checks.student import check_student
from kdtrain.config.checks.teacher import check_teacher
from kdtrain.config.checks.texts import check_texts
from kdtrain.config.checks.train import check_train
from kdtrain.config.checks.zero import check_zero
from kdtrain.config.load import Loaded
from kdtrain.config.problems import Problem, format_problems
from kdtrain.config.ranks import student_ranks
from kdtrain.config.schema import RunConfig
from kdtrain.errors import ConfigError

__all__ = ["check", "path_problems", "value_problems"]


def check(loaded: Loaded, *, world_size: int) -> None:
    """Raise one ConfigError with every problem, of values and of paths; return if there is none.

    world_size: ranks of the whole job, a dedicated teacher's included.
    """
    cfg = loaded.config
    found = [*value_problems(cfg, world_size=world_size), *path_problems(cfg)]
    if found:
        raise ConfigError(format_problems(found, loaded.origins))


def value_problems(cfg: RunConfig, *, world_size: int) -> list[Problem]:
    """Problems that show in the values alone, section by section. world_size: as for `check`."""
    report, num_students = Report(cfg), student_ranks(cfg, world_size)
    check_texts(cfg, report)
    check_run(cfg.run, report)
    check_student(cfg.student, report)
    check_teacher(cfg, num_students, report)
    check_dedicated_teacher(cfg, world_size, report)
    check_data(cfg, report)
    check_tokens_per_step(cfg, num_students, report)
    check_objective(cfg.objective, report)
    check_parallel(cfg, world_size, report)
    check_context_parallel(cfg, num_students, report)
    check_zero(cfg, report)
    check_optim(cfg.optim, report)
    check_train(cfg, report)
    check_schedule(cfg, report)
    check_checkpoint(cfg.checkpoint, report)
    check_eval(cfg, report)
    check_log(cfg.log, report)
    check_guard(cfg.guard, report)
    return report.problems


def path_problems(cfg: RunConfig) -> list[Problem]:
    """Problems that show only on the file system: stores, models, checkpoints and the output folder."""
    report = Report(cfg)
    check_paths(cfg, report)
    return report.problems
