"""Checkpoints of a run: written by all ranks at once, complete or not there at all, readable in any layout.

A checkpoint is a folder step_NNNNNN: one safetensors file per writing rank (`slices`) and checkpoint.json (`manifest`).
It is built as .step_NNNNNN.writing and renamed when complete, so a kill at any moment leaves the former ones untouched.
Reading one needs neither DeepSpeed nor a process group.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from kdtrain.dist.mesh import Mesh
from kdtrain.engine.manifest import MANIFEST, DamagedCheckpoint, FileEntry, Manifest, ParameterEntry
from kdtrain.engine.slices import CheckpointReader, Fragment, write_rank_file
from kdtrain.errors import CheckpointError
from kdtrain.log import LOGGER
from kdtrain.parallel.cut import Cut

if TYPE_CHECKING:
    from kdtrain.engine.zero import StudentEngine
    from kdtrain.models.backbone import Backbone

_NAME = re.compile(r"step_(\d{6,})")
# Keys of a config that do not change what the model computes from its weights, or change with the library's version.
_VOLATILE = frozenset(
    (
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)


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


def save(root: Path, engine: StudentEngine, *, step: int, state: dict[str, Any]) -> Path:
    """Write `root`/step_NNNNNN (`step`) with the engine's weights and moments and the caller's JSON-able `state`.

    Every rank must call it, between steps; rank 0's `state` is kept. A folder of the same step is replaced. Returns
    once the checkpoint is on disk. Communicates: small objects only. Raises CheckpointError on all ranks if writing
    failed on any; former checkpoints are then as they were.
    """
    from kdtrain.engine import zero_state

    mesh, backbone = engine.mesh, engine.backbone
    layout = {
        "tp": mesh.tp_size,
        "dp": mesh.dp_size,
        "zero_stage": engine.zero_stage,
        "dtype": str(backbone.config.dtype).removeprefix("torch."),
    }
    about = Description(step, backbone.full_shapes(), backbone.cuts, layout, _config_of(backbone), state)
    fragments = list(zero_state.local_fragments(engine))
    return write_checkpoint(root, mesh, about, fragments, zero_state.local_adam_steps(engine))


def load(folder: Path, engine: StudentEngine) -> dict[str, Any]:
    """Bring weights, moments and AdamW step counts to where `folder` was written, in any layout; its `state`.

    Every rank must call it. All bytes are checked against their sha256, the ranks sharing out the files. Communicates:
    small objects, and one all-gather of working parameters. Raises CheckpointError on all ranks when the checkpoint is
    damaged or of another model; the engine must then not be used.
    """
    from kdtrain.engine import zero_state

    mesh = engine.mesh

    def read() -> dict[str, Any]:
        with CheckpointReader(folder) as reader:
            _check_model(folder, reader.manifest, engine.backbone)
            reader.verify([entry.file for entry in reader.manifest.files[mesh.rank :: mesh.world_size]])
            zero_state.restore_local(engine, reader)
            return reader.manifest.state

    state: dict[str, Any] = _together(mesh, f"checkpoint {folder} was not loaded", read)
    zero_state.refresh_parameters(engine)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` that was given to `save`. Reads checkpoint.json only. Raises CheckpointError."""
    return Manifest.read(folder).state


def read_config(folder: Path) -> dict[str, Any]:
    """The model's Hugging Face config, as it was when `folder` was written. Raises CheckpointError."""
    return Manifest.read(folder).config


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

    Incomplete ones that are newer are passed over with a warning. Raises CheckpointError for one of a newer kdtrain.
    """
    for _, folder in sorted(_candidates(root), reverse=True):
        try:
            Manifest.read(folder).check_files(folder)
        except DamagedCheckpoint as error:
            LOGGER.warning("passed over: %s", error)
            continue
        return folder
    return None


def step_of(folder: Path) -> int:
    """Optimizer steps that a complete checkpoint has behind it. Raises CheckpointError for a folder that is none."""
    return Manifest.read(folder).step


def any_folder(root: Path) -> bool:
    """Whether `root` holds anything that was to be a checkpoint, complete or not."""
    return bool(_candidates(root))


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a checkpoint whose files are all there, of the right sizes. Raises as `find_latest`."""
    try:
        Manifest.read(folder).check_files(folder)
    except DamagedCheckpoint:
        return False
    return True


def identity(folder: Path) -> str:
    """16 hex digits that no other checkpoint has: of its checkpoint.json, which has every file's sha256."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16]


def size_bytes(folder: Path) -> int:
    """Bytes of all files of a checkpoint, by its manifest."""
    return sum(entry.size for entry in Manifest.read(folder).files)


def folder_name(step: int) -> str:
    """Name of the folder that holds a checkpoint of `step`."""
    return f"step_{step:06d}"


def retain(root: Path, keep_last: int, *, just_saved: Path, mesh: Mesh | None = None) -> None:
    """Remove complete checkpoints older than the `keep_last` newest ones, never `just_saved`. Every rank must call it.

    Damaged ones do not count and are left for a person to look at. A folder is renamed before it is emptied, so that a
    kill leaves no half-empty checkpoint. Communicates: one all-gather of None or a message. Raises ValueError for
    keep_last < 1; CheckpointError, on all ranks, when the file system refuses.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}")
    mesh = mesh or Mesh()
    _together(mesh, f"{root} was not tidied", lambda: _retain(root, keep_last, just_saved) if mesh.is_main else None)


def _retain(root: Path, keep_last: int, just_saved: Path) -> None:
    complete = {step: folder for step, folder in _candidates(root) if is_complete(folder)}
    for step in sorted(complete)[:-keep_last]:
        folder = complete[step]
        if folder != just_saved:
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


def write_checkpoint(
    root: Path, mesh: Mesh, about: Description, fragments: Iterable[Fragment], adam_steps: dict[str, int]
) -> Path:
    """Write `root`/step_NNNNNN from every rank's fragments; see `save`. adam_steps: of the parameters in them."""
    json.dumps(about.state)  # a TypeError must come before the first collective, on all ranks
    final = root / folder_name(about.step)
    temporary = root / f".{final.name}.writing"
    what = f"checkpoint {final} was not saved"
    _together(mesh, what, lambda: _prepare(root, temporary) if mesh.is_main else None)
    try:
        path = temporary / f"rank_{mesh.rank:05d}.safetensors"
        entry = _together(mesh, what, lambda: write_rank_file(path, fragments))
        answers = _gather_on_main(mesh, (entry, adam_steps))
        _together(mesh, what, lambda: _complete(temporary, final, about, answers) if mesh.is_main else None)
    except CheckpointError:
        if mesh.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        if mesh.world_size > 1:
            dist.barrier(group=mesh.world_group)  # no rank reports the failure, and ends the job, before it is undone
        raise
    return final


def _prepare(root: Path, temporary: Path) -> None:
    """Remove what interrupted saves and removals left, and make the folder that all ranks write into."""
    root.mkdir(parents=True, exist_ok=True)
    replaced = [
        old for old in root.glob(".step_*.replaced") if (root / old.name[1:].removesuffix(".replaced")).exists()
    ]
    for leftover in (*root.glob(".step_*.writing"), *root.glob(".step_*.removing"), *replaced):
        shutil.rmtree(leftover)
    temporary.mkdir()


def _complete(
    temporary: Path, final: Path, about: Description, answers: list[tuple[FileEntry, dict[str, int]]]
) -> None:
    """On rank 0, once all files are written: checkpoint.json, then the rename that makes the checkpoint exist."""
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
    with open(temporary / MANIFEST, "w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    _fsync_folder(temporary)
    _put_in_place(temporary, final)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename; a former folder of the same step steps aside first, under a name that `find_latest` still finds."""
    aside = final.parent / f".{final.name}.replaced"
    if final.exists():
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(final, aside)
    os.rename(temporary, final)
    _fsync_folder(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _candidates(root: Path) -> list[tuple[int, Path]]:
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


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _together(mesh: Mesh, what: str, action: Callable[[], Any]) -> Any:
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
    problems = [problem] * mesh.world_size
    if mesh.world_size > 1:
        dist.all_gather_object(problems, problem, group=mesh.world_group)
    failed = [(rank, text) for rank, text in enumerate(problems) if text is not None]
    if failed:
        rank, text = failed[0]
        others = "" if len(failed) == 1 else f" (and {len(failed) - 1} more ranks)"
        raise CheckpointError(f"{what}: rank {rank}{others}: {text}") from cause
    return answer


def _gather_on_main(mesh: Mesh, value: Any) -> list[Any]:
    """Every rank's value on rank 0, in rank order; an empty list elsewhere."""
    if mesh.world_size == 1:
        return [value]
    answers: list[Any] | None = [None] * mesh.world_size if mesh.is_main else None
    dist.gather_object(value, answers, dst=0, group=mesh.world_group)
    return answers or []


def _reason(error: OSError) -> str:
    return f"[Errno {error.errno}] {error.strerror}"


def _unpadded(cut: Cut | None) -> Cut | None:
    return None if cut is None else Cut(cut.dim, cut.pieces)


def _config_of(backbone: Backbone) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(backbone.config.to_json_string(use_diff=False))
    return config


def model_fingerprint(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> str:
    """16 hex digits of the parameters' names and shapes and of what the config says about the computation."""
    lasting = {key: value for key, value in config.items() if key not in _VOLATILE}
    text = json.dumps([lasting, {name: list(shape) for name, shape in shapes.items()}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_model(folder: Path, manifest: Manifest, backbone: Backbone) -> None:
    """Raises CheckpointError, naming both values, unless names, shapes and common config keys are equal."""
    shapes, config = backbone.full_shapes(), _config_of(backbone)
    there = {name: entry.shape for name, entry in manifest.parameters.items()}
    differ = [
        f"{n}: {there.get(n, 'absent')} there, {shapes.get(n, 'absent')} here"
        for n in {**there, **shapes}
        if there.get(n) != shapes.get(n)
    ]
    keys = sorted((config.keys() & manifest.config.keys()) - _VOLATILE)
    differ += [
        f"config {k}: {manifest.config[k]!r} there, {config[k]!r} here" for k in keys if manifest.config[k] != config[k]
    ]
    if differ:
        more = "" if len(differ) <= 5 else f"\n  and {len(differ) - 5} more differences"
        names = f"{manifest.fingerprint} there, {model_fingerprint(config, shapes)} here"
        raise CheckpointError(
            f"{folder} holds another model than this run trains ({names})\n  "
            + "\n  ".join(differ[:5])
            + more
            + "\n  why: resuming continues the same model\n"
            "  fix: resume with the student section it was saved with; to train another model, start another run.name"
        )
