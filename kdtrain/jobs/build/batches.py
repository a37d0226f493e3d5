"""The micro-batches of a run: packing, the training loader, the validation batches."""

from __future__ import annotations

from collections.abc import Iterator

from kdtrain.batch import Batch
from kdtrain.config.schema import RunConfig
from kdtrain.data.context import Share
from kdtrain.data.loader import StepLoader, StepShape, validation_batches
from kdtrain.data.packing import PackingSpec, key_space
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError
from kdtrain.jobs.inputs import Inputs


def packing_of(cfg: RunConfig, prefix: tuple[int, ...] = ()) -> PackingSpec:
    """How token streams become sequences. prefix: ids at the beginning of each, decided once per run."""
    return PackingSpec(cfg.data.seq_len, cfg.data.reset_positions, prefix)


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

    prefetch: steps prepared ahead; None: data.prefetch. pin_memory: as for `StepLoader`. Does not communicate. Raises
    StoreMismatch if two stores of the run, that of validation included, have the same keys.
    """
    d, packing = cfg.data, packing_of(cfg, prefix)
    key_space(inputs.stores, packing)
    return StepLoader(
        inputs.train,
        d.train_weights,
        packing=packing,
        shape=StepShape(d.tokens_per_step // d.seq_len, d.sequences_per_micro_batch),
        share=_share(mesh),
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
        share=_share(mesh),
        max_tokens=cfg.eval.max_tokens,
    )


def _share(mesh: Mesh) -> Share:
    return Share(mesh.dp_rank, mesh.dp_size, mesh.cp_rank, mesh.cp_size)
