"""Both models of a run on this rank, and the settings of the student's engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from kdtrain_kernels.dispatch import launch_one_row, row_kernels

from kdtrain.config.ranks import teacher_tp
from kdtrain.config.schema import RunConfig
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.point_to_point import P2PChannel
from kdtrain.distributed.vocab import ROW_MULTIPLE
from kdtrain.engine.settings import EngineSettings
from kdtrain.errors import ConfigError
from kdtrain.jobs.build.teacher import build_teacher, teacher_spec
from kdtrain.jobs.dedicated import remote_teacher
from kdtrain.jobs.inputs import Inputs
from kdtrain.models.backbone import Backbone
from kdtrain.models.head import LoadedHead
from kdtrain.models.info import ModelInfo
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.positions import check_positions
from kdtrain.models.quantize import require_torchao
from kdtrain.teacher.signal import HeadLayout
from kdtrain.teacher.source import SignalSource


@dataclass(frozen=True, slots=True)
class Models:
    """Both models on this rank.

    teacher_backbone: None without a teacher, and with a dedicated one, of which this rank has teacher_head.
    dedicated_attention: attention implementation on the dedicated teacher's ranks, by its name in a model's config.
    """

    student: Backbone
    teacher: SignalSource | None
    layout: HeadLayout
    teacher_backbone: Backbone | None
    teacher_head: LoadedHead | None = None
    dedicated_attention: str = ""

    @property
    def teacher_info(self) -> ModelInfo | None:
        """Facts of the whole teacher, in any layout; None without one."""
        if self.teacher_head is not None:
            return self.teacher_head.info
        return None if self.teacher_backbone is None else self.teacher_backbone.info()

    @property
    def teacher_attention(self) -> str:
        """The teacher's attention implementation by its name in a model's config; empty without a teacher."""
        return self.dedicated_attention if self.teacher_backbone is None else self.teacher_backbone.implementation


def student_spec(cfg: RunConfig) -> ModelSpec:
    """The student by cfg.student."""
    s = cfg.student
    return ModelSpec(
        s.weights,
        s.architecture,
        s.dtype,
        s.attention,
        s.activation_checkpointing,
        s.allow_unused_weights,
        seq_len=cfg.data.seq_len,
        sequences=cfg.data.sequences_per_micro_batch,
        seed=cfg.run.seed,
    )


def model_specs(cfg: RunConfig) -> list[ModelSpec]:
    """The student and, if there is one, the teacher."""
    return [spec for spec in (student_spec(cfg), teacher_spec(cfg)) if spec is not None]


def check_lengths(cfg: RunConfig, inputs: Inputs, *, trainable: bool) -> None:
    """Raise ConfigError for a model without positions for data.seq_len tokens; warn of one that was trained with fewer.

    trainable: whether the student will be trained. Does not communicate; all ranks get the same result.
    """
    teacher = teacher_spec(cfg)
    for role, spec, trains in (("student", student_spec(cfg), trainable), ("teacher", teacher, False)):
        if spec is not None:
            check_positions(spec, role, vocab_size=inputs.vocab_size, seq_len=cfg.data.seq_len, trainable=trains)


def build_models(
    cfg: RunConfig,
    inputs: Inputs,
    mesh: Mesh,
    device: torch.device,
    *,
    trainable: bool,
    channel: P2PChannel | None = None,
    on_stop: Callable[[], None] = lambda: None,
) -> Models:
    """Both models with their heads cut into the same rows; the student has no engine yet.

    channel: to a dedicated teacher; None without one. on_stop: called when a rank of that teacher received a stop
    signal. Every rank of the student must call it. Communicates as `load_backbone` and, for a dedicated teacher, as
    `remote_teacher` do.
    """
    spec = teacher_spec(cfg)
    if cfg.teacher.quantize is not None:
        require_torchao(cfg.teacher.quantize)  # before minutes of loading
    check_kernels(cfg.train.kernels, device)
    rows = head_rows(cfg, inputs.total_rows)
    student = load_backbone(
        student_spec(cfg),
        mesh,
        vocab_size=inputs.vocab_size,
        total_rows=rows,
        device=device,
        trainable=trainable,
        packed=cfg.data.reset_positions,
        sequence=cfg.parallel.sequence,
    )
    layout = HeadLayout(student.shard, mesh.tp_group, cfg.train.slab_bytes, cfg.train.kernels)
    if spec is None:
        return Models(student, None, layout, None)
    if channel is not None:
        remote, head, attention = remote_teacher(cfg, spec, student.shard, mesh, device, channel, on_stop)
        return Models(student, remote, layout, None, head, attention)
    teacher, backbone = build_teacher(cfg, spec, student.shard, mesh, device)
    return Models(student, teacher, layout, backbone)


def check_kernels(backend: str, device: torch.device, probe: Callable[[torch.device], None] = launch_one_row) -> None:
    """Launch the row kernels of train.kernels on one row; `auto` falls back to torch and logs the reason.

    Raises ConfigError for triton where it cannot run. Does not communicate: ranks on different machines may differ.
    """
    try:
        row_kernels(backend, device, probe=probe)
    except ValueError as error:
        raise ConfigError(
            f"train.kernels = {backend} cannot run on {device}\n"
            f"  why: {error}\n"
            "  fix: repair it, or set train.kernels=torch (auto would take it, and log the reason)"
        ) from error


def head_rows(cfg: RunConfig, total_rows: int) -> int:
    """total_rows rounded up so that each tp rank of student and teacher holds a multiple of ROW_MULTIPLE rows."""
    unit = ROW_MULTIPLE * max(cfg.parallel.tp, teacher_tp(cfg))
    return -(-total_rows // unit) * unit


def engine_settings(cfg: RunConfig) -> EngineSettings:
    """The part of the configuration that the student's engine reads."""
    return EngineSettings(cfg.zero, cfg.optim, cfg.student.dtype, cfg.data.sequences_per_micro_batch)
