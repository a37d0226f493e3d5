"""The teacher of a run on the ranks of the student (layouts plain and tp); for dedicated ranks see `jobs.dedicated`."""

from __future__ import annotations

import torch

from kdtrain.config.ranks import teacher_tp
from kdtrain.config.schema import RunConfig
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.engine.frozen import FrozenEngine
from kdtrain.models.backbone import Backbone
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.teacher.online import OnlineTeacher, Passes
from kdtrain.teacher.side_stream import SideStream


def teacher_spec(cfg: RunConfig) -> ModelSpec | None:
    """The teacher by cfg.teacher; None without teacher.weights."""
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


def build_teacher(
    cfg: RunConfig, spec: ModelSpec, shard: VocabShard, mesh: Mesh, device: torch.device
) -> tuple[OnlineTeacher, Backbone]:
    """The teacher of `spec` in the layout of cfg.teacher, and its Backbone.

    shard: rows of the student's head on this rank, which the teacher's head is cut into as well. mesh: the student's.
    Every rank must call it, before the student has an engine. Communicates as `load_backbone` does, and builds process
    groups where the teacher's tp differs from the student's.
    """
    t, tp = cfg.teacher, teacher_tp(cfg)
    sharded_mesh = mesh if tp == mesh.tp_size else Mesh.build(tp)
    # A plain teacher has no tp, also where ZeRO-3 partitions it; the ranks share the sequences as the student's do.
    own_mesh = sharded_mesh if tp > 1 else mesh.without_tp()
    cut_mesh, gather_mesh = _overlap_meshes(mesh, tp) if t.overlap else (own_mesh, mesh)
    backbone = load_backbone(
        spec,
        cut_mesh,
        vocab_size=shard.vocab_size,
        total_rows=shard.rows * mesh.tp_size,
        device=device if t.zero_stage == 0 else "cpu",
        trainable=False,
        packed=cfg.data.reset_positions,
    )
    limit = t.max_tokens_per_forward
    if t.zero_stage == 0:
        passes = Passes(side=SideStream(device) if t.overlap else None, max_tokens=limit)
        return OnlineTeacher(backbone, gather_mesh, shard, own_mesh, passes=passes), backbone
    engine = FrozenEngine(backbone, sharded_mesh, device=device, dtype=t.dtype, offload=t.offload)
    teacher = OnlineTeacher(
        backbone,
        mesh,
        shard,
        own_mesh,
        forward=engine.hidden_states,
        head=engine.head,
        passes=Passes(together=True, max_tokens=limit),
    )
    return teacher, backbone


def _overlap_meshes(mesh: Mesh, tp: int) -> tuple[Mesh, Mesh]:
    """Meshes that cut the teacher and gather its hidden states when it runs on a second stream.

    Their groups are not the student's: collectives of two streams must not share a communicator.
    """
    twin = Mesh.build(tp) if tp > mesh.tp_size else Mesh.build(mesh.tp_size, mesh.cp_size)
    return (twin, mesh) if tp > 1 else (twin.without_tp(), twin)
