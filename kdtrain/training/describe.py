"""What a run says of itself before it starts, and all that `--check` says."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdtrain.config.ranks import num_teachers, student_ranks, teacher_ranks, teacher_tp
from kdtrain.config.schema import RunConfig
from kdtrain.data.loader import StepLoader
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import checkpoint
from kdtrain.engine.mixed import refuse_float32_at_stage_3
from kdtrain.log import LOGGER
from kdtrain.models.attention import common_name
from kdtrain.models.backbone import Backbone
from kdtrain.models.info import ModelInfo
from kdtrain.models.load import ModelSpec, check_architecture, model_info
from kdtrain.models.quantize import require_torchao
from kdtrain.telemetry.jsonl_sink import read_records
from kdtrain.telemetry.wandb_sink import require_wandb
from kdtrain.training import build
from kdtrain.training.estimate import GIB, MemoryEstimate, ModelSize, estimate_memory, estimate_teacher_rank
from kdtrain.training.export import model_files
from kdtrain.training.inputs import Inputs
from kdtrain.training.sequence_prefix import PrefixChoice
from kdtrain.training.start import find_start, kept_prefix


def log_header(cfg: RunConfig, inputs: Inputs, models: build.Models, mesh: Mesh, device: torch.device) -> None:
    """The lines above the first step: layout, models, loss, data, memory."""
    student = models.student
    origin = "from scratch" if cfg.student.weights is None else f"from {cfg.student.weights}"
    LOGGER.info("mesh     %s   zero: student %d", mesh_line(cfg, mesh.world_size), cfg.zero.stage)
    LOGGER.info(
        "student  %s   %s parameters, %s, %s, %s",
        cfg.student.architecture or cfg.student.weights,
        f"{student.num_parameters():,}",
        origin,
        cfg.student.dtype,
        common_name(student.implementation),
    )
    if models.teacher_facts is not None:
        LOGGER.info(
            "teacher  %s   %s, frozen, %s, %s, %s",
            cfg.teacher.weights,
            _parameters(models.teacher_facts),
            _teacher_layout(cfg),
            cfg.teacher.dtype,
            common_name(models.teacher_attention),
        )
    LOGGER.info("loss     %s", loss_line(cfg))
    LOGGER.info("data     %s", data_line(cfg, inputs, mesh.dp_size))
    attention = student.implementation, models.teacher_attention
    log_memory(cfg, inputs, mesh.dp_size, attention=attention, on_cuda=device.type == "cuda")


def _parameters(facts: ModelInfo) -> str:
    full, active = facts.num_parameters, facts.num_active_parameters
    return f"{full:,} parameters" + ("" if active == full else f" ({active:,} per token)")


def _teacher_layout(cfg: RunConfig) -> str:
    if cfg.teacher.layout == "dedicated":
        return dedicated_line(cfg)
    tp = f"tp {teacher_tp(cfg)}" if cfg.teacher.layout == "tp" else "plain"
    zero = " x zero 3" if cfg.teacher.zero_stage == 3 else ""
    bits = "" if cfg.teacher.quantize is None else f", {cfg.teacher.quantize} weights"
    return tp + zero + (" in host memory" if cfg.teacher.offload else "") + bits


def mesh_line(cfg: RunConfig, world_size: int) -> str:
    """How the student's ranks are divided; cp only where sequences are."""
    p = cfg.parallel
    cp = f" x cp {p.cp}" if p.cp > 1 else ""
    return f"{world_size} ranks = dp {world_size // (p.tp * p.cp)}{cp} x tp {p.tp}"


def dedicated_line(cfg: RunConfig) -> str:
    """How ranks of their own make up teachers: "2 x tp 2 on 4 ranks of its own"."""
    ranks = teacher_ranks(cfg)
    return f"{num_teachers(cfg)} x tp {teacher_tp(cfg)} on {ranks} rank{'s' if ranks > 1 else ''} of its own"


def loss_line(cfg: RunConfig) -> str:
    """The objective in words."""
    z = f"; z-loss {cfg.objective.z_loss:g}" if cfg.objective.z_loss else ""
    if cfg.objective.name == "pretrain":
        return "cross-entropy" + z
    d = cfg.objective.distill
    return f"{d.divergence}, temperature {d.temperature:g}, weight {d.kd_weight:g}; ce weight {1 - d.kd_weight:g}{z}"


def data_line(cfg: RunConfig, inputs: Inputs, dp_size: int) -> str:
    """How many tokens there are and how a step is made of them."""
    d = cfg.data
    tokens = sum(store.num_tokens for store in inputs.train)
    per_rank = d.tokens_per_step // (d.seq_len * dp_size)
    return (
        f"{tokens:,} tokens in {len(inputs.train)} stores; {d.tokens_per_step:,} tokens/step = {dp_size} dp x "
        f"{d.sequences_per_micro_batch} seq x {per_rank // d.sequences_per_micro_batch} micro-batches x {d.seq_len}"
    )


def store_lines(cfg: RunConfig, inputs: Inputs, loader: StepLoader) -> list[str]:
    """Of each store: its sequences, how many train.total_tokens draws from it, and how often that passes over it."""
    steps = -(-cfg.train.total_tokens // cfg.data.tokens_per_step)
    found = loader.draws(steps * (cfg.data.tokens_per_step // cfg.data.seq_len))
    return [
        f"{store.path}: {there:,} sequences, {drawn:,} drawn, {drawn / there:.3g} passes"
        for store, (there, drawn) in zip(inputs.train, found, strict=True)
    ]


def log_stores(cfg: RunConfig, inputs: Inputs, loader: StepLoader) -> None:
    """A line for each store of data.train."""
    for line in store_lines(cfg, inputs, loader):
        LOGGER.info("store    %s", line)


def estimate(
    cfg: RunConfig, inputs: Inputs, dp_size: int, *, attention: tuple[str, str], on_cuda: bool
) -> MemoryEstimate:
    """Bytes per rank, from configurations alone. attention: names of both models' implementations."""
    teacher = build.teacher_spec(cfg)
    return estimate_memory(
        cfg,
        _size(build.student_spec(cfg), inputs),
        None if teacher is None else _size(teacher, inputs, trainable=False),
        dp_size=dp_size,
        on_cuda=on_cuda,
        student_attention=attention[0],
        teacher_attention=attention[1],
    )


def log_memory(cfg: RunConfig, inputs: Inputs, dp_size: int, *, attention: tuple[str, str], on_cuda: bool) -> None:
    """One line for the student's ranks, one for those of a dedicated teacher, and what a bucket of zero.extra costs."""
    found = estimate(cfg, inputs, dp_size, attention=attention, on_cuda=on_cuda)
    LOGGER.info("memory   %s", found.line())
    if "reduce_bucket_size" in cfg.zero.extra:
        others = {name: value for name, value in cfg.zero.extra.items() if name != "reduce_bucket_size"}
        usual = replace(cfg, zero=replace(cfg.zero, extra=others))
        without = estimate(usual, inputs, dp_size, attention=attention, on_cuda=on_cuda)
        LOGGER.info(
            "memory   buckets take %.2f GiB by zero.extra.reduce_bucket_size; %.2f GiB without it",
            found.parts["buckets"] / GIB,
            without.parts["buckets"] / GIB,
        )
    teacher = build.teacher_spec(cfg)
    if teacher is not None and teacher_ranks(cfg):
        size = _size(teacher, inputs, trainable=False)
        line = estimate_teacher_rank(cfg, size, dp_size=dp_size, attention=attention[1]).line()
        LOGGER.info("memory   teacher's ranks: %s", line)


def _size(spec: ModelSpec, inputs: Inputs, *, trainable: bool = True) -> ModelSize:
    facts = model_info(spec, inputs.vocab_size, trainable=trainable)
    return ModelSize(
        facts.num_parameters,
        _int(facts.config, "hidden_size"),
        _int(facts.config, "num_hidden_layers"),
        inputs.total_rows,
        facts.num_expert_parameters,
        facts.num_float32_parameters,
        _known(facts.config, "num_attention_heads"),
        _known(facts.config, "intermediate_size"),
    )


def _known(config: Any, name: str) -> int:
    """0 for a config that names it otherwise, or holds one per layer."""
    found = getattr(config, name, 0)
    return found if isinstance(found, int) else 0


def _int(config: Any, name: str) -> int:
    return int(getattr(config, name))


def print_check(cfg: RunConfig, inputs: Inputs, choice: PrefixChoice, *, world_size: int, trains: bool = True) -> None:
    """`--check`: everything that can be known before a device is touched. trains: or else only evaluates."""
    students = student_ranks(cfg, world_size)
    mesh = Mesh(world_size=students, tp_size=cfg.parallel.tp, cp_size=cfg.parallel.cp)
    student, teacher = _check_models(cfg, inputs, mesh, trains=trains)
    LOGGER.info("mesh     %s", mesh_line(cfg, students))
    if students < world_size:
        LOGGER.info("teacher  %s: %s", dedicated_line(cfg), list(range(students, world_size)))
    if (line := choice.line()) is not None:
        LOGGER.info("prefix   %s", line)
    if trains:
        loader = _check_start(cfg, inputs, choice, mesh, student)
        LOGGER.info("loss     %s", loss_line(cfg))
        LOGGER.info("data     %s", data_line(cfg, inputs, mesh.dp_size))
        log_stores(cfg, inputs, loader)
        attention = student.implementation, "" if teacher is None else teacher.implementation
        # what runs later may have a device that this machine has not
        log_memory(cfg, inputs, mesh.dp_size, attention=attention, on_cuda=os.environ.get("DS_ACCELERATOR") != "cpu")
        steps = -(-cfg.train.total_tokens // cfg.data.tokens_per_step)
        LOGGER.info("length   %s steps, %s tokens", f"{steps:,}", f"{cfg.train.total_tokens:,}")
    LOGGER.info("check    passed")


def _check_models(cfg: RunConfig, inputs: Inputs, mesh: Mesh, *, trains: bool) -> tuple[Backbone, Backbone | None]:
    """Raise what `build.build_models` would; the student and the teacher, on meta."""
    packed, vocab_size, quantize = cfg.data.reset_positions, inputs.vocab_size, cfg.teacher.quantize
    if quantize is not None:
        require_torchao(quantize)
    student = check_architecture(
        build.student_spec(cfg), vocab_size, mesh, packed=packed, sequence=cfg.parallel.sequence, trainable=trains
    )
    if trains:
        refuse_float32_at_stage_3(model_info(build.student_spec(cfg), vocab_size).float32, cfg)
    if (spec := build.teacher_spec(cfg)) is None:
        return student, None
    mesh = replace(mesh, tp_size=teacher_tp(cfg))
    teacher = check_architecture(spec, vocab_size, mesh, packed=packed, trainable=False, quantize=quantize)
    return student, teacher


def _check_start(cfg: RunConfig, inputs: Inputs, choice: PrefixChoice, mesh: Mesh, student: Backbone) -> StepLoader:
    """Raise what a run would between its models and its first step: of data order, resume, files, records.

    The order of a new run's sequences is that with the likelier prefix; nothing is measured here.
    """
    folder = Path(cfg.run.output_dir) / cfg.run.name
    point = find_start(cfg, inputs, folder)
    resumed = None if point is None or point.is_stage else checkpoint.read_state(point.path)["loader"]
    kept = kept_prefix(point, choice)
    prefix = choice.likely if kept is None or choice.configured is not None else kept
    loader = build.build_loader(cfg, inputs, mesh, prefix, prefetch=0)
    if point is not None:
        checkpoint.check_model(point.path, student)
    if resumed is not None:
        loader.check_state(resumed)
    model_files(inputs.tokenizer_dir, cfg.student.weights)
    read_records(folder / "metrics.jsonl")
    require_wandb(cfg.log.wandb)
    return loader
