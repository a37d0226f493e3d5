"""The steps that make a folder a checkpoint: prepare it, let all ranks write into it, complete it, remove old ones.

`checkpoint` runs them while training waits, `background` while training continues. A checkpoint is built as
.step_NNNNNN.writing and renamed when complete, so that a kill at any moment leaves the former ones untouched.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from kdtrain.distributed.collectives import gather_objects
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    FileEntry,
    Manifest,
    ParameterEntry,
    model_fingerprint,
)
from kdtrain.errors import CheckpointError
from kdtrain.parallel.shard_spec import ShardSpec
from kdtrain.stores.folders import publish, write_manifest

_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True, slots=True)
class Description:
    """Content of a checkpoint besides its slices. Equal on all ranks except `state`, of which rank 0's is written.

    cuts: of the layout that saves. layout, config, state: JSON-able.
    """

    step: int
    shapes: dict[str, tuple[int, ...]]
    cuts: dict[str, ShardSpec]
    layout: dict[str, Any]
    config: dict[str, Any]
    state: dict[str, Any]


def folder_name(step: int) -> str:
    """Name of the folder that holds a checkpoint of `step`."""
    return f"step_{step:06d}"


@dataclass(frozen=True, slots=True)
class CheckpointPath:
    """Paths of a checkpoint of `step` below `root`, while it is written and afterwards."""

    root: Path
    step: int

    @property
    def final(self) -> Path:
        """The folder once it is complete."""
        return self.root / folder_name(self.step)

    @property
    def temporary(self) -> Path:
        """The folder until then."""
        return self.root / f".{folder_name(self.step)}.writing"

    @property
    def failure(self) -> str:
        """Beginning of an error message."""
        return f"checkpoint {self.final} was not saved"

    def rank_file(self, rank: int) -> Path:
        """The file that `rank` writes."""
        return self.temporary / f"rank_{rank:05d}.safetensors"


def candidates(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints below root, unordered; a retired one counts if no other has its step."""
    if not root.is_dir():
        return []
    found: dict[int, Path] = {}
    for folder in sorted(root.iterdir(), reverse=True):  # "." sorts before "s": step_N comes before .step_N.replaced
        name = folder.name[1:].removesuffix(".replaced") if folder.name.endswith(".replaced") else folder.name
        match = _NAME.fullmatch(name)
        if match and folder.is_dir():
            found.setdefault(int(match[1]), folder)
    return list(found.items())


def prepare(place: CheckpointPath) -> None:
    """On rank 0: remove leftovers of interrupted saves and removals; create the folder that all ranks write into."""
    root = place.root
    root.mkdir(parents=True, exist_ok=True)
    replaced = [
        old for old in root.glob(".step_*.replaced") if (root / old.name[1:].removesuffix(".replaced")).exists()
    ]
    for leftover in (*root.glob(".step_*.writing"), *root.glob(".step_*.removing"), *replaced):
        shutil.rmtree(leftover)
    place.temporary.mkdir()


def complete(place: CheckpointPath, about: Description, written: list[tuple[FileEntry, dict[str, int]]]) -> None:
    """On rank 0, after all files are written: write checkpoint.json, then rename the folder.

    written: of each rank, its file and AdamW's step count of every parameter in it. Raises OSError, CheckpointError.
    """
    temporary = place.temporary
    steps: dict[str, int] = {}
    for _, adam_steps in written:
        for name, step in adam_steps.items():
            if steps.setdefault(name, step) != step:
                raise CheckpointError(f"{name}: ranks disagree about AdamW's step count, {steps[name]} and {step}")
    files = tuple(entry for entry, _ in written if entry.slices)
    manifest = Manifest(
        step=about.step,
        layout=about.layout,
        config=about.config,
        fingerprint=model_fingerprint(about.config, about.shapes),
        parameters={
            name: ParameterEntry(shape, _unpadded(about.cuts.get(name)), steps.get(name, 0))
            for name, shape in about.shapes.items()
        },
        files=files,
        state=about.state,
    )
    manifest.check_coverage(temporary)
    for entry, _ in written:
        if not entry.slices:
            (temporary / entry.name).unlink(missing_ok=True)
    # Fails here when the ranks do not share the file system.
    manifest.check_files(temporary)
    write_manifest(temporary, MANIFEST, manifest.to_json().encode())
    retired = place.root / f".{place.final.name}.replaced"  # `candidates` finds it while it is the only one
    publish(temporary, place.final, retired)
    if retired.exists():
        shutil.rmtree(retired)


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a checkpoint whose files are all there, of the right sizes.

    Raises CheckpointError for one of a newer kdtrain.
    """
    try:
        Manifest.read(folder).check_files(folder)
    except DamagedCheckpoint:
        return False
    return True


def remove_older(root: Path, keep_last: int, keep_every: int | None, just_saved: Path) -> None:
    """Remove complete checkpoints older than the `keep_last` newest, except those at multiples of keep_every.

    Never removes `just_saved`. Damaged ones do not count and are kept for inspection. A folder is renamed before its
    files are deleted, so that a kill leaves no half-empty checkpoint. Raises CheckpointError when the file system
    refuses.
    """
    found = {step: folder for step, folder in candidates(root) if is_complete(folder)}
    for step in sorted(found)[:-keep_last]:
        folder = found[step]
        if folder == just_saved or (keep_every is not None and step % keep_every == 0):
            continue
        removing = root / f".{folder.name.strip('.')}.removing"
        try:
            os.rename(folder, removing)
            shutil.rmtree(removing)
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be removed: {_reason(error)}\n"
                "  why: checkpoint.keep_last limits how many checkpoints stay\n"
                "  fix: remove it by hand, check permissions"
            ) from error


@contextmanager
def rollback_on_error(mesh: Mesh, place: CheckpointPath) -> Iterator[None]:
    """Remove the unfinished folder of `place` if the block raises CheckpointError, which it must on all ranks.

    Communicates: one barrier in that case.
    """
    try:
        yield
    except CheckpointError:
        if mesh.is_main:
            shutil.rmtree(place.temporary, ignore_errors=True)
        if mesh.world_size > 1:
            # All ranks wait for rank 0 here: a rank that raised earlier could end the job before the folder is removed.
            dist.barrier(group=mesh.world_group)
        raise


def all_ranks_or_raise(mesh: Mesh, what: str, action: Callable[[], Any]) -> Any:
    """Run `action` on every rank and return its result; if it failed on any rank, raise CheckpointError on all.

    Communicates: one all-gather of None or a message.
    """
    result: Any = None
    problem: str | None = None
    cause: Exception | None = None
    try:
        result = action()
    except OSError as error:
        fix = "free space, check quota, permissions and that all hosts share this file system"
        problem, cause = f"{error.filename or what}: {_reason(error)}\n  fix: {fix}", error
    except CheckpointError as error:
        problem, cause = str(error), error
    # Every rank needs every other's outcome: a rank that raised alone would leave the others in their next collective.
    problems = gather_objects(problem, mesh.world_group)
    failed = [(rank, text) for rank, text in enumerate(problems) if text is not None]
    if failed:
        rank, text = failed[0]
        others = "" if len(failed) == 1 else f" (and {len(failed) - 1} more ranks)"
        raise CheckpointError(f"{what}: rank {rank}{others}: {text}") from cause
    return result


def gather_on_main(mesh: Mesh, value: Any) -> list[Any]:
    """Every rank's value on rank 0, in rank order; an empty list elsewhere."""
    if mesh.world_size == 1:
        return [value]
    gathered: list[Any] | None = [None] * mesh.world_size if mesh.is_main else None
    # Only rank 0 writes checkpoint.json, which lists the files and step counts of all ranks.
    dist.gather_object(value, gathered, dst=0, group=mesh.world_group)
    return gathered or []


def _reason(error: OSError) -> str:
    return f"[Errno {error.errno}] {error.strerror}"


def _unpadded(cut: ShardSpec | None) -> ShardSpec | None:
    return None if cut is None else ShardSpec(cut.dim, cut.shards, segments=cut.segments)
