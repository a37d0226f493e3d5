"""The micro-batches of a run: packing, the training loader, the validation batches."""

from __future__ import annotations

from collections.abc import Iterator

from kdtrain.batch import Batch
from kdtrain.config.schema import RunConfig
from kdtrain.data.loader import StepLoader, validation_batches
from kdtrain.data.packing import Packing
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError
from kdtrain.jobs.inputs import Inputs


def packing_of(cfg: RunConfig, prefix: tuple[int, ...] = ()) -> Packing:
    """How token streams become sequences. prefix: ids at the beginning of each, decided once per run."""
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
    """The loader of this data rank's micro-batches, in a global order that depends on run.seed alone.

    prefetch: steps prepared ahead; None: data.prefetch. pin_memory: as for `StepLoader`. Does not communicate.
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


def evaluation_batches(cfg: RunConfig, inputs: Inputs, mesh: Mesh, prefix: tuple[int, ...] = ()) -> Iterator[Batch]:
    """This data rank's validation batches, the same at each call. Raises ConfigError without data.validation."""
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
