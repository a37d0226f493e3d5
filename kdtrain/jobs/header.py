"""What a run logs about itself before its first step: layout, models, loss, data, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kdtrain.config.ranks import in_flight, num_teachers, teacher_ranks, teacher_tp
from kdtrain.config.schema import RunConfig
from kdtrain.data.loader import StepLoader
from kdtrain.distributed.mesh import Mesh
from kdtrain.jobs.build.models import Models, student_spec
from kdtrain.jobs.build.teacher import teacher_spec
from kdtrain.jobs.inputs import Inputs
from kdtrain.log import LOGGER
from kdtrain.models.attention import common_name
from kdtrain.models.info import ModelInfo
from kdtrain.models.load import ModelSpec, model_info
from kdtrain.planning.describe import data_line, dedicated_line, loss_line, mesh_line, teacher_line
from kdtrain.planning.estimate import (
    GIB,
    MemoryEstimate,
    MemoryInputs,
    ModelSize,
    estimate_memory,
    estimate_teacher_rank,
)


def log_header(cfg: RunConfig, inputs: Inputs, models: Models, mesh: Mesh, device: torch.device) -> None:
    """The lines above the first step: layout, models, loss, data, memory."""
    student = models.student
    origin = "from scratch" if cfg.student.weights is None else f"from {cfg.student.weights}"
    LOGGER.info("mesh     %s   zero: student %d", mesh_line(cfg.parallel, mesh.world_size), cfg.zero.stage)
    LOGGER.info(
        "student  %s   %s parameters, %s, %s, %s",
        cfg.student.architecture or cfg.student.weights,
        f"{student.num_parameters():,}",
        origin,
        cfg.student.dtype,
        common_name(student.implementation),
    )
    if models.teacher_info is not None:
        LOGGER.info(
            "teacher  %s   %s, frozen, %s, %s, %s",
            cfg.teacher.weights,
            _parameters(models.teacher_info),
            dedicated_ranks_line(cfg) if teacher_ranks(cfg) else teacher_line(cfg.teacher, teacher_tp(cfg)),
            cfg.teacher.dtype,
            common_name(models.teacher_attention),
        )
    log_loss_and_data(cfg, inputs, mesh.dp_size)
    attention = student.implementation, models.teacher_attention
    log_memory(cfg, inputs, mesh.dp_size, attention=attention, on_cuda=device.type == "cuda")


def log_loss_and_data(cfg: RunConfig, inputs: Inputs, dp_size: int) -> None:
    """One line for the objective and one for the tokens of a step."""
    tokens = sum(store.num_tokens for store in inputs.train)
    LOGGER.info("loss     %s", loss_line(cfg.objective))
    LOGGER.info("data     %s", data_line(cfg.data, tokens, len(inputs.train), dp_size))


def dedicated_ranks_line(cfg: RunConfig) -> str:
    """`dedicated_line` of the configuration."""
    return dedicated_line(num_teachers(cfg), teacher_tp(cfg))


def _parameters(facts: ModelInfo) -> str:
    full, active = facts.num_parameters, facts.num_active_parameters
    return f"{full:,} parameters" + ("" if active == full else f" ({active:,} per token)")


def log_stores(cfg: RunConfig, inputs: Inputs, loader: StepLoader) -> None:
    """A line per store of data.train: its sequences, how many train.total_tokens draws from it, the passes over it."""
    steps = -(-cfg.train.total_tokens // cfg.data.tokens_per_step)
    draws = loader.draws(steps * (cfg.data.tokens_per_step // cfg.data.seq_len))
    for store, (there, drawn) in zip(inputs.train, draws, strict=True):
        numbers = f"{there:,} sequences, {drawn:,} drawn, {drawn / there:.3g} passes"
        LOGGER.info("store    %s: %s", store.path, numbers)


def memory_inputs(cfg: RunConfig) -> MemoryInputs:
    """The part of the configuration that the memory estimate reads."""
    return MemoryInputs(
        student=cfg.student,
        teacher=cfg.teacher,
        data=cfg.data,
        parallel=cfg.parallel,
        zero=cfg.zero,
        teacher_tp=teacher_tp(cfg),
        in_flight=in_flight(cfg),
        slab_bytes=cfg.train.slab_bytes,
        async_write=cfg.checkpoint.async_write,
    )


def estimate_of_run(
    cfg: RunConfig, inputs: Inputs, dp_size: int, *, attention: tuple[str, str], on_cuda: bool
) -> MemoryEstimate:
    """Bytes per rank of the student, from configurations alone. attention: names of both models' implementations."""
    teacher = teacher_spec(cfg)
    return estimate_memory(
        memory_inputs(cfg),
        _size(student_spec(cfg), inputs),
        None if teacher is None else _size(teacher, inputs, trainable=False),
        dp_size=dp_size,
        on_cuda=on_cuda,
        student_attention=attention[0],
        teacher_attention=attention[1],
    )


def log_memory(cfg: RunConfig, inputs: Inputs, dp_size: int, *, attention: tuple[str, str], on_cuda: bool) -> None:
    """Memory of the student's ranks, the cost of zero.extra.reduce_bucket_size, memory of a dedicated teacher's ranks.

    One line each; the last two where they apply.
    """
    found = estimate_of_run(cfg, inputs, dp_size, attention=attention, on_cuda=on_cuda)
    LOGGER.info("memory   %s", found.line())
    if "reduce_bucket_size" in cfg.zero.extra:
        others = {name: value for name, value in cfg.zero.extra.items() if name != "reduce_bucket_size"}
        default = replace(cfg, zero=replace(cfg.zero, extra=others))
        without = estimate_of_run(default, inputs, dp_size, attention=attention, on_cuda=on_cuda)
        LOGGER.info(
            "memory   buckets take %.2f GiB by zero.extra.reduce_bucket_size; %.2f GiB without it",
            found.parts["buckets"] / GIB,
            without.parts["buckets"] / GIB,
        )
    teacher = teacher_spec(cfg)
    if teacher is not None and teacher_ranks(cfg):
        size = _size(teacher, inputs, trainable=False)
        line = estimate_teacher_rank(memory_inputs(cfg), size, dp_size=dp_size, attention=attention[1]).line()
        LOGGER.info("memory   teacher's ranks: %s", line)


def _size(spec: ModelSpec, inputs: Inputs, *, trainable: bool = True) -> ModelSize:
    facts = model_info(spec, inputs.vocab_size, trainable=trainable)
    return ModelSize(
        facts.num_parameters,
        int(facts.config.hidden_size),
        int(facts.config.num_hidden_layers),
        inputs.total_rows,
        facts.num_expert_parameters,
        facts.num_float32_parameters,
        _int_or_zero(facts.config, "num_attention_heads"),
        _int_or_zero(facts.config, "intermediate_size"),
    )


def _int_or_zero(config: Any, name: str) -> int:
    """0 for a model config without the attribute, or with a list of one value per layer."""
    found = getattr(config, name, 0)
    return found if isinstance(found, int) else 0
