"""Checkpoints of a run: written by all ranks, complete or absent, readable in any layout.

A checkpoint is a folder step_NNNNNN: one safetensors file per writing rank (`slices`) and checkpoint.json (`manifest`);
`commit` has the steps of writing one. Reading one needs neither DeepSpeed nor a process group.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.commit import (
    CheckpointPath,
    Description,
    all_ranks_or_raise,
    candidates,
    complete,
    folder_name,
    gather_on_main,
    is_complete,
    prepare,
    remove_older,
    rollback_on_error,
)
from kdtrain.engine.manifest import MANIFEST, VOLATILE, DamagedCheckpoint, Manifest, model_fingerprint
from kdtrain.engine.slices import CheckpointReader, Fragment, write_rank_file
from kdtrain.errors import CheckpointError
from kdtrain.log import LOGGER
from kdtrain.stores.checksums import sha256_of

__all__ = ["Description", "folder_name", "is_complete"]

if TYPE_CHECKING:
    from kdtrain.engine.background import BackgroundWriter, Prune
    from kdtrain.engine.zero import StudentEngine
    from kdtrain.models.backbone import Backbone


def save(root: Path, engine: StudentEngine, *, step: int, state: dict[str, Any]) -> Path:
    """Write `root`/step_NNNNNN (`step`) with the engine's weights and moments and the caller's JSON-able `state`.

    Every rank must call it, between steps; rank 0's `state` is kept. A folder of the same step is replaced. Returns
    once the checkpoint is on disk. Communicates: small objects only. Raises CheckpointError on all ranks if writing
    failed on any; former checkpoints are then as they were.
    """
    from kdtrain.engine import zero_state

    fragments = list(zero_state.local_fragments(engine))
    about = description_of(engine, step, state)
    return write_checkpoint(root, engine.mesh, about, fragments, zero_state.local_adam_steps(engine))


def save_async(
    writer: BackgroundWriter, root: Path, engine: StudentEngine, *, step: int, state: dict[str, Any], prune: Prune
) -> Path:
    """As `save`, but returns after the slices have been copied; `writer` does the rest, see there for `prune`."""
    from kdtrain.engine import zero_state

    fragments = list(zero_state.local_fragments(engine))
    adam_steps = zero_state.local_adam_steps(engine)
    return writer.begin(root, description_of(engine, step, state), fragments, adam_steps, prune=prune)


def description_of(engine: StudentEngine, step: int, state: dict[str, Any]) -> Description:
    """Content of a checkpoint of `engine` besides its slices. Does not communicate."""
    mesh, backbone = engine.mesh, engine.backbone
    layout = {
        "tp": mesh.tp_size,
        "dp": mesh.dp_size,
        "cp": mesh.cp_size,
        "zero_stage": engine.zero_stage,
        "dtype": str(backbone.config.dtype).removeprefix("torch."),
    }
    return Description(step, backbone.full_shapes(), backbone.cuts, layout, _config_of(backbone), state)


def load(folder: Path, engine: StudentEngine) -> dict[str, Any]:
    """Restore weights, moments and AdamW step counts from `folder`, in any layout; returns its `state`.

    Every rank must call it. All bytes are checked against their sha256; each rank checks a part of the files.
    Communicates: small objects, and one all-gather of working parameters. Raises CheckpointError on all ranks when the
    checkpoint is damaged or of another model; the engine must then not be used.
    """
    from kdtrain.engine import zero_state

    mesh = engine.mesh

    def read() -> dict[str, Any]:
        with CheckpointReader(folder) as reader:
            _check_model(folder, reader.manifest, engine.backbone)
            reader.verify([entry.name for entry in reader.manifest.files[mesh.rank :: mesh.world_size]])
            zero_state.restore_local(engine, reader)
            return reader.manifest.state

    # A rank that cannot read its part stops all: the others would go on with weights of another step.
    state: dict[str, Any] = all_ranks_or_raise(mesh, f"checkpoint {folder} was not loaded", read)
    zero_state.refresh_parameters(engine)
    return state


def check_model(folder: Path, backbone: Backbone) -> None:
    """Raise CheckpointError if `load` would find another model in `folder`. Reads checkpoint.json only."""
    _check_model(folder, Manifest.read(folder), backbone)


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` that was passed to `save`. Reads checkpoint.json only. Raises CheckpointError."""
    return Manifest.read(folder).state


def read_config(folder: Path) -> dict[str, Any]:
    """The model's Hugging Face config, as it was when `folder` was written. Raises CheckpointError."""
    return Manifest.read(folder).config


def read_dtype(folder: Path) -> str:
    """The dtype of the student that wrote `folder`: "float32" or "bfloat16". Raises CheckpointError."""
    return str(Manifest.read(folder).layout["dtype"])


def read_full_parameters(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full float32 weight on the CPU), one at a time, after checking every file's sha256.

    Needs neither DeepSpeed nor a process group. Raises CheckpointError.
    """
    with CheckpointReader(folder) as reader:
        reader.verify()
        for name in reader.names():
            yield name, reader.read_full(name, "master")


def find_latest(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`, None if there is none. Does not communicate.

    Incomplete ones that are newer are skipped with a warning. Raises CheckpointError for one of a newer kdtrain.
    """
    for _, folder in sorted(candidates(root), reverse=True):
        try:
            Manifest.read(folder).check_files(folder)
        except DamagedCheckpoint as error:
            LOGGER.warning("skipped: %s", error)
            continue
        return folder
    return None


def step_of(folder: Path) -> int:
    """Optimizer steps made before a complete checkpoint was saved. Raises CheckpointError for a folder that is none."""
    return Manifest.read(folder).step


def any_folder(root: Path) -> bool:
    """Whether `root` holds a checkpoint, complete or not."""
    return bool(candidates(root))


def identity(folder: Path) -> str:
    """16 hex digits that identify a checkpoint: of its checkpoint.json, which has every file's sha256."""
    return sha256_of(folder / MANIFEST)[:16]


def size_bytes(folder: Path) -> int:
    """Bytes of all files of a checkpoint, by its manifest."""
    return sum(entry.size for entry in Manifest.read(folder).files)


def retain(
    root: Path, keep_last: int, *, just_saved: Path, keep_every: int | None = None, mesh: Mesh | None = None
) -> None:
    """Remove checkpoints as `commit.remove_older` does, on rank 0. Every rank must call it.

    Communicates: one all-gather of None or a message. Raises ValueError for keep_last or keep_every < 1;
    CheckpointError, on all ranks, when the file system refuses.
    """
    mesh = mesh or Mesh()
    if keep_last < 1 or (keep_every is not None and keep_every < 1):
        raise ValueError(f"keep_last and keep_every must be at least 1, got {keep_last} and {keep_every}")

    def prune() -> None:
        if mesh.is_main:
            remove_older(root, keep_last, keep_every, just_saved)

    # Only rank 0 removes folders; an error there is raised everywhere, as every rank calls this.
    all_ranks_or_raise(mesh, f"{root} was not pruned", prune)


def write_checkpoint(
    root: Path, mesh: Mesh, about: Description, fragments: Iterable[Fragment], adam_steps: dict[str, int]
) -> Path:
    """Write `root`/step_NNNNNN from every rank's fragments; see `save`. adam_steps: of the parameters in them."""
    json.dumps(about.state)  # raises TypeError on all ranks, before the first collective
    place = CheckpointPath(root, about.step)
    # No rank may write before rank 0 has made the folder, nor rank 0 complete it before all have written.
    all_ranks_or_raise(mesh, place.failure, lambda: prepare(place) if mesh.is_main else None)
    with rollback_on_error(mesh, place):
        entry = all_ranks_or_raise(mesh, place.failure, lambda: write_rank_file(place.rank_file(mesh.rank), fragments))
        written = gather_on_main(mesh, (entry, adam_steps))
        all_ranks_or_raise(mesh, place.failure, lambda: complete(place, about, written) if mesh.is_main else None)
    return place.final


def _config_of(backbone: Backbone) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(backbone.config.to_json_string(use_diff=False))
    return config


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Raises CheckpointError, naming both values, unless common keys of the saved model's config and `config` agree.

    The same check of the config as in `load`, for callers that have no model yet. Reads checkpoint.json only.
    """
    if differ := _config_differences(Manifest.read(folder).config, config):
        raise CheckpointError(_another_model(folder, differ))


def _check_model(folder: Path, manifest: Manifest, backbone: Backbone) -> None:
    """Raises CheckpointError, naming both values, unless names, shapes and common config keys are equal."""
    shapes, config = backbone.full_shapes(), _config_of(backbone)
    there = {name: entry.shape for name, entry in manifest.parameters.items()}
    differ = [
        f"{n}: {there.get(n, 'absent')} there, {shapes.get(n, 'absent')} here"
        for n in {**there, **shapes}
        if there.get(n) != shapes.get(n)
    ]
    differ += _config_differences(manifest.config, config)
    if differ:
        names = f" ({manifest.fingerprint} there, {model_fingerprint(config, shapes)} here)"
        raise CheckpointError(_another_model(folder, differ, names))


def _config_differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    keys = sorted((here.keys() & there.keys()) - VOLATILE)
    return [f"config {k}: {there[k]!r} there, {here[k]!r} here" for k in keys if there[k] != here[k]]


def _another_model(folder: Path, differ: list[str], names: str = "") -> str:
    more = "" if len(differ) <= 5 else f"\n  and {len(differ) - 5} more differences"
    return (
        f"{folder} holds another model than this run trains{names}\n  "
        + "\n  ".join(differ[:5])
        + more
        + "\n  why: resuming, or a new stage, continues the same model\n"
        "  fix: use the student section it was saved with; to train another model, start another run.name"
    )
