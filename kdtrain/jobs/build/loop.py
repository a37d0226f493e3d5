"""The values of a configuration that the training loop takes."""

from __future__ import annotations

from functools import partial

from kdtrain.config.schema import RunConfig
from kdtrain.engine.optim import learning_rate
from kdtrain.training.cadence import Cadence
from kdtrain.training.progress import Progress
from kdtrain.training.trainer import LoopSettings


def loop_settings(cfg: RunConfig) -> LoopSettings:
    """What the trainer reads in each step."""
    return LoopSettings(
        seed=cfg.run.seed,
        tokens_per_step=cfg.data.tokens_per_step,
        learning_rate=partial(
            learning_rate, schedule=cfg.schedule, peak=cfg.optim.lr, total_tokens=cfg.train.total_tokens
        ),
        prefetch_teacher=cfg.teacher.layout == "dedicated",
        check_replicas=cfg.debug.check_replicas,
    )


def cadence_of(cfg: RunConfig, begun: Progress | None = None) -> Cadence:
    """The steps of the run at which it reports, evaluates and saves. begun: progress so far."""
    return Cadence(
        cfg.train.total_tokens,
        cfg.data.tokens_per_step,
        begun,
        log_every=cfg.log.every_steps,
        eval_every=cfg.eval.every_steps,
        save_every=cfg.checkpoint.every_steps,
        evaluates=cfg.data.validation is not None,
    )
