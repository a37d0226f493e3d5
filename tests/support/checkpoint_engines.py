"""DeepSpeed engines of tiny students whose steps depend on nothing but their number, for tests of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from kdtrain.batch import Batch
from kdtrain.config.schema import RunConfig
from kdtrain.distributed.mesh import Mesh
from kdtrain.losses import linear_cross_entropy
from kdtrain.models.load import ModelSpec, load_backbone

if TYPE_CHECKING:
    from kdtrain.engine.zero import StudentEngine

SEQUENCES, SEQ_LEN = 4, 12


def join() -> None:
    """Start DeepSpeed in this rank's process group."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def build(
    folder: Path,
    mesh: Mesh,
    stage: Literal[0, 1, 2, 3],
    dtype: Literal["float32", "bfloat16"],
    architecture: str,
    vocab: int,
    *,
    seed: int = 1,
    nudged: bool = False,
) -> StudentEngine:
    """An engine of folder/ARCHITECTURE/config.json. nudged: every weight moves by one unit in its last place."""
    from kdtrain.engine.zero import StudentEngine
    from kdtrain.jobs.build.models import engine_settings

    cfg = RunConfig()
    cfg.zero.stage, cfg.student.dtype = stage, dtype
    cfg.data.sequences_per_micro_batch = SEQUENCES // mesh.dp_size
    cfg.optim.eps, cfg.optim.grad_clip = 1e-4, 0.5
    spec = ModelSpec(architecture=str(folder / architecture / "config.json"), dtype=dtype, attention="sdpa", seed=seed)
    backbone = load_backbone(spec, mesh, vocab_size=vocab, trainable=True)
    if nudged:
        generator = torch.Generator().manual_seed(0)
        for param in backbone.parameters():
            up = torch.rand(param.shape, generator=generator) < 0.5
            param.data = torch.nextafter(param.data, torch.where(up, torch.inf, -torch.inf))
    return StudentEngine(backbone, mesh, engine_settings(cfg), device=torch.device("cpu"))


def one_step(engine: StudentEngine, step: int) -> tuple[float, float]:
    """A step on data of its own; (loss, gradient norm)."""
    generator = torch.Generator().manual_seed(step)
    shard = engine.backbone.shard
    tokens = torch.randint(shard.vocab_size, (SEQUENCES, SEQ_LEN + 1), generator=generator)
    batch = Batch(
        input_ids=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=torch.ones(SEQUENCES, SEQ_LEN),
        position_ids=torch.arange(SEQ_LEN).expand(SEQUENCES, -1),
        sample_ids=torch.arange(SEQUENCES),
    )
    mine = SEQUENCES // engine.mesh.dp_size
    batch = batch.rows(engine.mesh.dp_rank * mine, (engine.mesh.dp_rank + 1) * mine)
    parts = engine(
        batch,
        lambda hidden, head: linear_cross_entropy(
            hidden,
            head,
            batch.labels.reshape(-1),
            weight=batch.loss_mask.reshape(-1),
            shard=shard,
            group=engine.mesh.tp_group,
        ),
    )
    engine.backward(parts.loss, SEQUENCES * SEQ_LEN)
    result = engine.step(1e-3 * step)
    assert result.applied
    return float(parts.loss), result.grad_norm


def name_of(case: Sequence[object]) -> str:
    """A folder name for a case."""
    return "-".join(str(part) for part in case)
