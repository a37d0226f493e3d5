"""`--check`: checks of a run before it uses a device."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from kdtrain.config.ranks import student_ranks, teacher_tp
from kdtrain.config.schema import RunConfig
from kdtrain.data.loader import StepLoader
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import checkpoint
from kdtrain.engine.mixed import refuse_float32_at_stage_3
from kdtrain.jobs.build.batches import build_loader
from kdtrain.jobs.build.models import student_spec
from kdtrain.jobs.build.teacher import teacher_spec
from kdtrain.jobs.export_hf import model_files
from kdtrain.jobs.header import dedicated_ranks_line, log_loss_and_data, log_memory, log_stores
from kdtrain.jobs.inputs import Inputs
from kdtrain.jobs.sequence_prefix import PrefixChoice
from kdtrain.jobs.start import find_start, kept_prefix
from kdtrain.log import LOGGER
from kdtrain.models.backbone import Backbone
from kdtrain.models.load import check_architecture, model_info
from kdtrain.models.quantize import require_torchao
from kdtrain.planning.describe import mesh_line
from kdtrain.telemetry.jsonl_sink import read_records
from kdtrain.telemetry.wandb_sink import require_wandb


def print_check(cfg: RunConfig, inputs: Inputs, choice: PrefixChoice, *, world_size: int, trains: bool = True) -> None:
    """Check models, layout and start of a job of `world_size` ranks, and log what would run.

    trains: false for a job that only evaluates. Does not communicate and uses no device. Raises what the job would.
    """
    students = student_ranks(cfg, world_size)
    mesh = Mesh(world_size=students, tp_size=cfg.parallel.tp, cp_size=cfg.parallel.cp)
    student, teacher = _check_models(cfg, inputs, mesh, trains=trains)
    LOGGER.info("mesh     %s", mesh_line(cfg.parallel, students))
    if students < world_size:
        LOGGER.info("teacher  %s: %s", dedicated_ranks_line(cfg), list(range(students, world_size)))
    if (line := choice.line()) is not None:
        LOGGER.info("prefix   %s", line)
    if trains:
        loader = _check_start(cfg, inputs, choice, mesh, student)
        log_loss_and_data(cfg, inputs, mesh.dp_size)
        log_stores(cfg, inputs, loader)
        attention = student.implementation, "" if teacher is None else teacher.implementation
        # the job may run on a machine with a CUDA device that this one does not have
        log_memory(cfg, inputs, mesh.dp_size, attention=attention, on_cuda=os.environ.get("DS_ACCELERATOR") != "cpu")
        steps = -(-cfg.train.total_tokens // cfg.data.tokens_per_step)
        LOGGER.info("length   %s steps, %s tokens", f"{steps:,}", f"{cfg.train.total_tokens:,}")
    LOGGER.info("check    passed")


def _check_models(cfg: RunConfig, inputs: Inputs, mesh: Mesh, *, trains: bool) -> tuple[Backbone, Backbone | None]:
    """The student and the teacher on the meta device. Raises what `build_models` would."""
    packed, vocab_size, quantize = cfg.data.reset_positions, inputs.vocab_size, cfg.teacher.quantize
    if quantize is not None:
        require_torchao(quantize)
    student = check_architecture(
        student_spec(cfg), vocab_size, mesh, packed=packed, sequence=cfg.parallel.sequence, trainable=trains
    )
    if trains:
        refuse_float32_at_stage_3(model_info(student_spec(cfg), vocab_size).float32, cfg.zero.stage)
    if (spec := teacher_spec(cfg)) is None:
        return student, None
    mesh = replace(mesh, tp_size=teacher_tp(cfg))
    teacher = check_architecture(spec, vocab_size, mesh, packed=packed, trainable=False, quantize=quantize)
    return student, teacher


def _check_start(cfg: RunConfig, inputs: Inputs, choice: PrefixChoice, mesh: Mesh, student: Backbone) -> StepLoader:
    """The run's loader. Raises what a run would between its models and its first step: data order, resume, files.

    A new run's order is that with the prefix it will most likely have; no prefix is measured here.
    """
    folder = Path(cfg.run.output_dir) / cfg.run.name
    point = find_start(cfg, inputs, folder)
    resumed = None if point is None or point.is_stage else checkpoint.read_state(point.path)["loader"]
    kept = kept_prefix(point, choice)
    prefix = choice.likely if kept is None or choice.configured is not None else kept
    loader = build_loader(cfg, inputs, mesh, prefix, prefetch=0)
    if point is not None:
        checkpoint.check_model(point.path, student)
    if resumed is not None:
        loader.load_state_dict(resumed)  # for the numbers of its stores, on which the draws depend
    model_files(inputs.tokenizer_dir, cfg.student.weights)
    read_records(folder / "metrics.jsonl")
    require_wandb(cfg.log.wandb)
    return loader
