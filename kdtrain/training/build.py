"""The composition root: the only place that sees the whole configuration and turns it into live objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from kdtrain_kernels.dispatch import launch_one_row, row_kernels

from kdtrain.batch import Batch
from kdtrain.config.ranks import teacher_ranks, teacher_tp
from kdtrain.config.schema import RunConfig
from kdtrain.data.loader import StepLoader, validation_batches
from kdtrain.data.packing import Packing
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.point_to_point import P2PChannel
from kdtrain.distributed.vocab import ROW_MULTIPLE
from kdtrain.engine.frozen import FrozenEngine
from kdtrain.engine.zero import StudentEngine
from kdtrain.errors import ConfigError
from kdtrain.models.backbone import Backbone
from kdtrain.models.flops import forward_flops_per_token, peak_flops, training_flops_per_token
from kdtrain.models.head import LoadedHead
from kdtrain.models.info import ModelInfo
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.positions import check_positions
from kdtrain.models.quantize import require_torchao
from kdtrain.objectives.base import Objective
from kdtrain.objectives.distill import Distill
from kdtrain.objectives.pretrain import Pretrain
from kdtrain.teacher.online import OnlineTeacher
from kdtrain.teacher.side_stream import SideStream
from kdtrain.teacher.signal import DenseSignal
from kdtrain.teacher.signal_loss import HeadLayout
from kdtrain.teacher.source import TeacherSource
from kdtrain.training.dedicated import remote_teacher
from kdtrain.training.inputs import Inputs
from kdtrain.training.report import Costs
from kdtrain.training.timing import PhaseTimer


@dataclass(frozen=True, slots=True)
class Models:
    """Both models on this rank.

    teacher_backbone: None without a teacher and if it lives on ranks of its own; then its head is here. elsewhere:
    what computes attention there, by its name in a model's config.
    """

    student: Backbone
    teacher: TeacherSource | None
    layout: HeadLayout
    teacher_backbone: Backbone | None
    teacher_head: LoadedHead | None = None
    elsewhere: str = ""

    @property
    def teacher_facts(self) -> ModelInfo | None:
        """Of the whole teacher, wherever it is; None without one."""
        if self.teacher_head is not None:
            return self.teacher_head.info
        return None if self.teacher_backbone is None else self.teacher_backbone.info()

    @property
    def teacher_attention(self) -> str:
        """Its implementation, wherever it is, by its name in a model's config; empty without a teacher."""
        return self.elsewhere if self.teacher_backbone is None else self.teacher_backbone.implementation


def student_spec(cfg: RunConfig) -> ModelSpec:
    """What the configuration says of the student."""
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
    )


def teacher_spec(cfg: RunConfig) -> ModelSpec | None:
    """What the configuration says of the teacher; None without one."""
    t = cfg.teacher
    if t.weights is None:
        return None
    return ModelSpec(
        t.weights,
        dtype=t.dtype,
        attention=t.attention,
        allow_unused_weights=t.allow_unused_weights,
        seq_len=cfg.data.seq_len,
    )


def specs(cfg: RunConfig) -> list[ModelSpec]:
    """Every model of the run."""
    return [spec for spec in (student_spec(cfg), teacher_spec(cfg)) if spec is not None]


def check_lengths(cfg: RunConfig, inputs: Inputs, *, trainable: bool) -> None:
    """ConfigError for a model that has no positions for data.seq_len tokens; a warning for one that was made for fewer.

    trainable: whether the student will be trained. Before ranks find each other, alike on all; does not communicate.
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
    """Both models, their heads cut into the same rows; no engine of the student yet. Every rank must call it.

    channel: to a teacher on ranks of its own. on_stop: called when that teacher has been asked to end.
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
        seed=cfg.run.seed,
        packed=cfg.data.reset_positions,
        sequence=cfg.parallel.sequence,
    )
    layout = HeadLayout(student.shard, mesh.tp_group, cfg.train.slab_bytes, cfg.train.kernels)
    if spec is None:
        return Models(student, None, layout, None)
    if channel is not None:
        remote, head, attention = remote_teacher(cfg, spec, student.shard, mesh, device, channel, on_stop)
        return Models(student, remote, layout, None, head, attention)
    return add_teacher(cfg, spec, Models(student, None, layout, None), mesh, device)


def check_kernels(backend: str, device: torch.device, probe: Callable[[torch.device], None] = launch_one_row) -> None:
    """Launch one row by the kernels of train.kernels; `auto` takes torch where that fails, and logs why.

    Raises ConfigError for triton where it cannot run. Communicates nothing: ranks on machines that differ may differ.
    """
    try:
        row_kernels(backend, device, probe=probe)
    except ValueError as error:
        raise ConfigError(
            f"train.kernels = {backend} cannot run on {device}\n"
            f"  why: {error}\n"
            "  fix: mend that, or set train.kernels=torch (auto would take it, and log the reason)"
        ) from error


def add_teacher(cfg: RunConfig, spec: ModelSpec, models: Models, mesh: Mesh, device: torch.device) -> Models:
    """The teacher of `spec` in the layout that cfg.teacher asks for, beside a student that has no engine yet."""
    t, shard = cfg.teacher, models.student.shard
    tp = teacher_tp(cfg)
    sharded_mesh = mesh if tp == mesh.tp_size else Mesh.build(tp)
    # A whole teacher has no tp, whatever ranks ZeRO-3 divides it among; sequences are shared as the student's are.
    own_mesh = sharded_mesh if tp > 1 else mesh.without_tp()
    cut_mesh, gather_mesh = _ahead_meshes(mesh, tp) if t.overlap else (own_mesh, mesh)
    backbone = load_backbone(
        spec,
        cut_mesh,
        vocab_size=shard.vocab_size,
        total_rows=shard.rows * mesh.tp_size,
        device=device if t.zero_stage == 0 else "cpu",
        trainable=False,
        packed=cfg.data.reset_positions,
    )
    if t.zero_stage == 0:
        side = SideStream(device) if t.overlap else None
        teacher = OnlineTeacher(backbone, gather_mesh, shard, own_mesh, side=side, max_tokens=t.max_tokens_per_forward)
        return replace(models, teacher=teacher, teacher_backbone=backbone)
    engine = FrozenEngine(backbone, sharded_mesh, device=device, dtype=t.dtype, offload=t.offload)
    teacher = OnlineTeacher(
        backbone,
        mesh,
        shard,
        own_mesh,
        forward=engine.hidden_states,
        head=engine.head,
        together=True,
        max_tokens=t.max_tokens_per_forward,
    )
    return replace(models, teacher=teacher, teacher_backbone=backbone)


def _ahead_meshes(mesh: Mesh, tp: int) -> tuple[Mesh, Mesh]:
    """What a teacher is cut with, and where it gathers hidden states: on a second stream, over groups of its own."""
    twin = Mesh.build(tp) if tp > mesh.tp_size else Mesh.build(mesh.tp_size, mesh.cp_size)
    return (twin, mesh) if tp > 1 else (twin.without_tp(), twin)


def head_rows(cfg: RunConfig, total_rows: int) -> int:
    """total_rows rounded up, so that every rank of a student's and of a teacher's tp group holds whole multiples."""
    unit = ROW_MULTIPLE * max(cfg.parallel.tp, teacher_tp(cfg))
    return -(-total_rows // unit) * unit


def packing_of(cfg: RunConfig, prefix: tuple[int, ...] = ()) -> Packing:
    """How streams become sequences; prefix: the ids before each, which a run decides once."""
    return Packing(cfg.data.seq_len, cfg.data.reset_positions, prefix)


def build_loader(
    cfg: RunConfig,
    inputs: Inputs,
    mesh: Mesh,
    prefix: tuple[int, ...] = (),
    *,
    prefetch: int | None = None,
    pin_memory: bool = False,
) -> StepLoader:
    """This data rank's micro-batches; their global order depends on run.seed alone. prefetch: default data.prefetch.

    pin_memory: for a run on CUDA, as `StepLoader`.
    """
    d = cfg.data
    return StepLoader(
        inputs.train,
        d.train_weights,
        packing=packing_of(cfg, prefix),
        sequences_per_step=d.tokens_per_step // d.seq_len,
        sequences_per_micro_batch=d.sequences_per_micro_batch,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        cp_rank=mesh.cp_rank,
        cp_size=mesh.cp_size,
        seed=cfg.run.seed,
        prefetch=d.prefetch if prefetch is None else prefetch,
        pin_memory=pin_memory,
    )


class TimedTeacher:
    """A teacher whose time is counted under the phase "teacher"."""

    def __init__(self, teacher: TeacherSource, timer: PhaseTimer) -> None:
        self._teacher = teacher
        self._timer = timer

    def begin_step(self, micro_batches: Sequence[Batch]) -> None:
        """As the teacher's."""
        with self._timer.phase("teacher"):
            self._teacher.begin_step(micro_batches)

    def signal(self, batch: Batch) -> DenseSignal:
        """As the teacher's."""
        with self._timer.phase("teacher"):
            return self._teacher.signal(batch)


def build_objective(cfg: RunConfig, engine: StudentEngine, models: Models, timer: PhaseTimer) -> Objective:
    """The objective that objective.name names."""
    if cfg.objective.name == "pretrain":
        return Pretrain(engine, models.layout, z_loss=cfg.objective.z_loss)
    if models.teacher is None:
        raise ConfigError("objective.name = distill needs a teacher\n  fix: set teacher.weights to a model folder")
    return Distill(
        engine, TimedTeacher(models.teacher, timer), cfg.objective.distill, models.layout, z_loss=cfg.objective.z_loss
    )


def evaluation_batches(cfg: RunConfig, inputs: Inputs, mesh: Mesh, prefix: tuple[int, ...] = ()) -> Iterator[Batch]:
    """The same validation batches each time; data.validation must be set."""
    if inputs.validation is None:
        raise ConfigError("data.validation is not set\n  fix: name a token store to evaluate on")
    return validation_batches(
        inputs.validation,
        packing=packing_of(cfg, prefix),
        sequences_per_batch=cfg.data.sequences_per_micro_batch,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        cp_rank=mesh.cp_rank,
        cp_size=mesh.cp_size,
        max_tokens=cfg.eval.max_tokens,
    )


def costs_of(cfg: RunConfig, models: Models, mesh: Mesh, device: torch.device) -> Costs:
    """FLOPs per token of both models, of experts those that a token passes, and the devices' peak."""
    student, facts, seq_len = models.student, models.teacher_facts, cfg.data.seq_len
    distils = cfg.objective.name == "distill" and facts is not None
    teacher = forward_flops_per_token(facts.config, facts.num_active_parameters, seq_len) if distils and facts else 0.0
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Costs(
        training_flops_per_token(student.config, student.num_parameters(), seq_len),
        teacher,
        None if peak is None else peak * (mesh.world_size + teacher_ranks(cfg)),
    )
