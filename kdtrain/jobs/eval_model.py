"""Evaluation of a student on held-out text: `launch/eval_model.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdtrain.config.cli import Request
from kdtrain.config.ranks import teacher_ranks
from kdtrain.config.schema import RunConfig
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import bootstrap
from kdtrain.errors import ConfigError
from kdtrain.evaluation.validation import Validation
from kdtrain.jobs import dedicated
from kdtrain.jobs.build.batches import evaluation_batches
from kdtrain.jobs.build.models import Models, build_models, check_lengths, model_specs
from kdtrain.jobs.build.teacher import teacher_spec
from kdtrain.jobs.check import print_check
from kdtrain.jobs.export_hf import exported_prefix
from kdtrain.jobs.inputs import Inputs, open_inputs
from kdtrain.jobs.quantized import quantize_teacher
from kdtrain.jobs.ranks import on_main
from kdtrain.jobs.sequence_prefix import Prefix, PrefixChoice, decide_prefix, prefix_choice, require_shared
from kdtrain.log import LOGGER, setup_logging
from kdtrain.models.backbone import call_with_head


def run_evaluation(request: Request) -> int:
    """Evaluate student.weights on data.validation and print the means as one line of JSON; returns 0.

    With --check: check and log what would run. Every rank must call it.
    """
    cfg = request.config
    setup_logging()
    if cfg.student.weights is None:
        raise ConfigError("student.weights is not set\n  fix: name the Hugging Face folder to evaluate")
    inputs = open_inputs(cfg, model_specs(cfg))
    check_lengths(cfg, inputs, trainable=False)
    choice = prefix_choice(cfg, inputs)
    if request.check_only:
        evaluation_batches(cfg, inputs, Mesh())  # raises without validation data
        _trained_prefix(cfg, inputs, choice)
        print_check(cfg, inputs, choice, world_size=request.world_size, trains=False)
        return 0
    with bootstrap.runtime(teacher_ranks(cfg), deterministic=cfg.debug.deterministic) as rank:
        if rank.roles.is_teacher:
            dedicated.serve(cfg, teacher_spec(cfg), inputs.vocab_size, rank)
            return 0
        with dedicated.student_side(cfg, rank):
            mesh = Mesh.build(cfg.parallel.tp, cfg.parallel.cp)
            means = _evaluate(cfg, inputs, choice, mesh, rank)
            if mesh.is_main:
                print(json.dumps(means, sort_keys=True))
    return 0


def _evaluate(
    cfg: RunConfig, inputs: Inputs, choice: PrefixChoice, mesh: Mesh, rank: bootstrap.Runtime
) -> dict[str, float]:
    models = build_models(cfg, inputs, mesh, rank.device, trainable=False, channel=rank.channel)
    if cfg.teacher.quantize is not None:
        first = next(evaluation_batches(cfg, inputs, mesh, choice.likely)).to(rank.device)
        quantize_teacher(cfg, models, first, mesh)
    prefix = _evaluation_prefix(cfg, inputs, choice, models, mesh, rank)

    def student(batch: Any, head_fn: Any) -> Any:
        return call_with_head(models.student, batch, head_fn)

    validation = Validation(student, models.teacher, models.layout, mesh)
    return validation.run(evaluation_batches(cfg, inputs, mesh, prefix), rank.device)


def _evaluation_prefix(
    cfg: RunConfig, inputs: Inputs, choice: PrefixChoice, models: Models, mesh: Mesh, rank: bootstrap.Runtime
) -> Prefix:
    """The prefix that student.weights was trained with, if it is an export of kdtrain and the configuration agrees."""
    trained = on_main(mesh, lambda: _trained_prefix(cfg, inputs, choice))
    if trained is not None and choice.configured in (None, trained):
        if trained or choice.usual:
            LOGGER.info("prefix   %s, as in the run that made student.weights", choice.name(trained))
        return trained
    if trained is not None:
        LOGGER.warning(
            "data.sequence_prefix = %s, but student.weights was trained with %s: its numbers are not those of its run",
            cfg.data.sequence_prefix,
            choice.name(trained),
        )
    return decide_prefix(cfg, choice, inputs, models, mesh, rank.device)


def _trained_prefix(cfg: RunConfig, inputs: Inputs, choice: PrefixChoice) -> Prefix | None:
    """The prefix in the metadata of the export student.weights; None for a folder that is not kdtrain's.

    Raises ConfigError for damaged metadata, StoreMismatch for a prefix that would be used and is not in the softmax.
    """
    trained = exported_prefix(Path(cfg.student.weights or ""))
    if trained is not None and choice.configured in (None, trained):
        require_shared(trained, inputs, f"the run that made student.weights = {cfg.student.weights}")
    return trained
