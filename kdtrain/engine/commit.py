"""What makes a folder a checkpoint: prepared, filled by all ranks, complete or not there at all, and removed in time.

`checkpoint` says what the steps are; `background` takes the same ones while training goes on. A checkpoint is built
as .step_NNNNNN.writing and renamed when complete, so a kill at any moment leaves the former ones untouched.
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
from kdtrain.parallel.cut import Cut
from kdtrain.stores.folders import publish, write_manifest

_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True, slots=True)
class Description:
    """What a checkpoint says besides its slices. Equal on all ranks, but for `state`, of which rank 0's is kept.

    cuts: of the layout that saves. layout, config, state: JSON-able.
    """

    step: int
    shapes: dict[str, tuple[int, ...]]
    cuts: dict[str, Cut]
    layout: dict[str, Any]
    config: dict[str, Any]
    state: dict[str, Any]


def folder_name(step: int) -> str:
    """Name of the folder that holds a checkpoint of `step`."""
    return f"step_{step:06d}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint of `step` is built and where it will be, below `root`."""

    root: Path
    step: int

    @property
    def final(self) -> Path:
        """The folder's name once it is a checkpoint."""
        return self.root / folder_name(self.step)

    @property
    def temporary(self) -> Path:
        """Its name until then."""
        return self.root / f".{folder_name(self.step)}.writing"

    @property
    def failure(self) -> str:
        """What an error's message begins with."""
        return f"checkpoint {self.final} was not saved"

    def rank_file(self, rank: int) -> Path:
        """The file that `rank` writes."""
        return self.temporary / f"rank_{rank:05d}.safetensors"


def candidates(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints below root, unordered; one that steps aside counts while it is alone."""
    if not root.is_dir():
        return []
    found: dict[int, Path] = {}
    for folder in sorted(root.iterdir(), reverse=True):  # "." sorts before "s": step_N comes before .step_N.replaced
        name = folder.name[1:].removesuffix(".replaced") if folder.name.endswith(".replaced") else folder.name
        match = _NAME.fullmatch(name)
        if match and folder.is_dir():
            found.setdefault(int(match[1]), folder)
    return list(found.items())


def prepare(place: Place) -> None:
    """On rank 0: remove what interrupted saves and removals left, and make the folder that all ranks write into."""
    root = place.root
    root.mkdir(parents=True, exist_ok=True)
    replaced = [
        old for old in root.glob(".step_*.replaced") if (root / old.name[1:].removesuffix(".replaced")).exists()
    ]
    for leftover in (*root.glob(".step_*.writing"), *root.glob(".step_*.removing"), *replaced):
        shutil.rmtree(leftover)
    place.temporary.mkdir()


def complete(place: Place, about: Description, answers: list[tuple[FileEntry, dict[str, int]]]) -> None:
    """On rank 0, once all files are written: checkpoint.json, then the rename that makes the checkpoint exist.

    answers: of each rank, its file and AdamW's step count of every parameter in it. Raises OSError, CheckpointError.
    """
    temporary = place.temporary
    steps: dict[str, int] = {}
    for _, some in answers:
        for name, step in some.items():
            if steps.setdefault(name, step) != step:
                raise CheckpointError(f"{name}: ranks disagree about AdamW's step count, {steps[name]} and {step}")
    files = tuple(entry for entry, _ in answers if entry.slices)
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
    for entry, _ in answers:
        if not entry.slices:
            (temporary / entry.file).unlink(missing_ok=True)
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
    """Remove complete checkpoints older than the `keep_last` newest, but those at multiples of keep_every.

    Never `just_saved`. Damaged ones do not count and are left for a person to look at. A folder is renamed before it
    is emptied, so that a kill leaves no half-empty checkpoint. Raises CheckpointError when the file system refuses.
    """
    found = {step: folder for step, folder in candidates(root) if is_complete(folder)}
    for step in sorted(found)[:-keep_last]:
        folder = found[step]
        if folder == just_saved or (keep_every is not None and step % keep_every == 0):
            continue
        doomed = root / f".{folder.name.strip('.')}.removing"
        try:
            os.rename(folder, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be removed: {_reason(error)}\n"
                "  why: checkpoint.keep_last limits how many checkpoints stay\n"
                "  fix: remove it by hand, check permissions"
            ) from error


@contextmanager
def undone_if_it_fails(mesh: Mesh, place: Place) -> Iterator[None]:
    """A CheckpointError in the block, which all ranks raise, leaves nothing of `place` behind. Then: one barrier."""
    try:
        yield
    except CheckpointError:
        if mesh.is_main:
            shutil.rmtree(place.temporary, ignore_errors=True)
        if mesh.world_size > 1:
            dist.barrier(group=mesh.world_group)  # no rank reports the failure, and ends the job, before it is undone
        raise


def together(mesh: Mesh, what: str, action: Callable[[], Any]) -> Any:
    """Run `action` on every rank and return its answer; if it failed on any rank, CheckpointError on all of them.

    Communicates: one all-gather of None or a message.
    """
    answer: Any = None
    problem: str | None = None
    cause: Exception | None = None
    try:
        answer = action()
    except OSError as error:
        fix = "free space, check quota, permissions and that all hosts share this file system"
        problem, cause = f"{error.filename or what}: {_reason(error)}\n  fix: {fix}", error
    except CheckpointError as error:
        problem, cause = str(error), error
    told = gather_objects(problem, mesh.world_group)
    failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
    if failed:
        rank, text = failed[0]
        others = "" if len(failed) == 1 else f" (and {len(failed) - 1} more ranks)"
        raise CheckpointError(f"{what}: rank {rank}{others}: {text}") from cause
    return answer


def gather_on_main(mesh: Mesh, value: Any) -> list[Any]:
    """Every rank's value on rank 0, in rank order; an empty list elsewhere."""
    if mesh.world_size == 1:
        return [value]
    answers: list[Any] | None = [None] * mesh.world_size if mesh.is_main else None
    dist.gather_object(value, answers, dst=0, group=mesh.world_group)
    return answers or []


def _reason(error: OSError) -> str:
    return f"[Errno {error.errno}] {error.strerror}"


def _unpadded(cut: Cut | None) -> Cut | None:
    return None if cut is None else Cut(cut.dim, cut.pieces, segments=cut.segments)
