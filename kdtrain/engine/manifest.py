"""Content of `checkpoint.json`: parameters, how they were cut, and which file holds which slice. No tensors here.

A saved piece (one tensor-parallel rank's part of a parameter, padding dropped) is stored as flat slices. The *saved
order* of a parameter is its pieces one after the other, each in row-major order; for a parameter that is replicated
or cut along dim 0 that is the row-major order of the full parameter.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtrain.errors import CheckpointError
from kdtrain.parallel.shard_spec import ShardSpec
from kdtrain.stores.checksums import sha256_of_json
from kdtrain.stores.files import StoredFile

MANIFEST = "checkpoint.json"
FORMAT = "kdtrain-checkpoint"
VERSION = 2
KINDS = ("master", "exp_avg", "exp_avg_sq")
"""float32 weights and AdamW's two moments."""
# Keys of a config that do not change what the model computes from its weights, or change with the library's version.
VOLATILE = frozenset(
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


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing or changed, or the checkpoint was never completed."""


@dataclass(frozen=True, slots=True)
class Slice:
    """`numel` elements of one saved piece, from its flat `offset` on."""

    name: str
    kind: str
    tp_rank: int
    offset: int
    numel: int

    @property
    def key(self) -> str:
        """The slice's name inside its safetensors file."""
        return f"{self.name}|{self.kind}|{self.tp_rank}|{self.offset}"


@dataclass(frozen=True, slots=True)
class ParameterEntry:
    """A parameter's full, unpadded shape, its cut when saved (None: replicated) and AdamW's step count."""

    shape: tuple[int, ...]
    cut: ShardSpec | None
    adam_step: int

    def pieces(self) -> list[int]:
        """Elements of each saved piece, by tp rank; 0 for one that a lower rank has saved."""
        if self.cut is None:
            return [math.prod(self.shape)]
        return [0 if self.cut.is_replica(rank) else self.held(rank) for rank in range(self.cut.tp_size)]

    def held(self, tp_rank: int) -> int:
        """Elements that `tp_rank` holds, padding left out."""
        if self.cut is None:
            return math.prod(self.shape)
        rest = math.prod((*self.shape[: self.cut.dim], *self.shape[self.cut.dim + 1 :]))
        return self.cut.held_size(tp_rank) * rest


@dataclass(frozen=True, slots=True)
class FileEntry(StoredFile):
    """One rank's file and its slices."""

    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of `checkpoint.json`.

    layout: tp, dp, cp, ZeRO stage and dtype of the run that saved. config: the model's Hugging Face config.
    fingerprint: of config and shapes, shown in messages. state: the caller's.
    """

    step: int
    layout: dict[str, Any]
    config: dict[str, Any]
    fingerprint: str
    parameters: dict[str, ParameterEntry]
    files: tuple[FileEntry, ...]
    state: dict[str, Any]

    def check_coverage(self, where: Path) -> None:
        """Raises CheckpointError unless the slices of every piece of every parameter cover it exactly once."""
        found: dict[tuple[str, str, int], list[tuple[int, int]]] = defaultdict(list)
        for entry in self.files:
            for s in entry.slices:
                if s.name not in self.parameters or s.kind not in KINDS:
                    raise damaged(where, f"{entry.name} holds {s.key!r}, which is not a parameter of this checkpoint")
                found[s.name, s.kind, s.tp_rank].append((s.offset, s.offset + s.numel))
        for name, parameter in self.parameters.items():
            sizes = dict(enumerate(parameter.pieces()))
            for kind in KINDS:
                for tp_rank, size in sizes.items():
                    _check_tiles(where, f"{kind} of {name}, tp rank {tp_rank}", found[name, kind, tp_rank], size)
        for name, kind, tp_rank in found:
            if tp_rank >= len(self.parameters[name].pieces()):
                raise damaged(where, f"{kind} of {name} has slices of tp rank {tp_rank}, which did not exist")

    def to_json(self) -> str:
        """The text of `checkpoint.json`, one parameter and one file a line."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "layout": self.layout,
            "fingerprint": self.fingerprint,
            "config": self.config,
            "state": self.state,
        }
        parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        parts.append(_json_block("parameters", {n: _parameter_to_json(p) for n, p in self.parameters.items()}))
        parts.append(_json_block("files", {f.name: _file_to_json(f) for f in self.files}))
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Parse `folder`/checkpoint.json and check coverage. Raises CheckpointError; opens no other file."""
        path = folder / MANIFEST
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DamagedCheckpoint(
                f"{path} does not exist\n"
                "  why: it is written last, so this folder is an unfinished checkpoint or none at all\n"
                "  fix: name a complete step_NNNNNN folder"
            ) from error
        except (OSError, ValueError) as error:
            raise damaged(path, f"cannot be read: {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise damaged(path, f"is not a {FORMAT} file")
        version = found.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise CheckpointError(
                f"{path} has format version {version}, this kdtrain reads up to {VERSION}\n"
                "  why: it was written by a newer kdtrain\n"
                "  fix: use that version, or export the checkpoint there and start from the exported weights"
            )
        try:
            manifest = cls(
                step=int(found["step"]),
                layout=dict(found["layout"]),
                config=dict(found["config"]),
                fingerprint=str(found["fingerprint"]),
                parameters={n: _parameter_from_json(p) for n, p in found["parameters"].items()},
                files=tuple(_file_from_json(n, f) for n, f in found["files"].items()),
                state=dict(found["state"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise damaged(path, f"lacks or misstates a field: {type(error).__name__} {error}") from error
        manifest.check_coverage(path)
        return manifest

    def check_files(self, folder: Path) -> None:
        """Raises CheckpointError when a file is missing or has another size than when written. Opens none."""
        for entry in self.files:
            path = folder / entry.name
            try:
                size = entry.size_found(folder)
            except OSError as error:
                raise damaged(path, f"cannot be found: [Errno {error.errno}] {error.strerror}") from error
            if size != entry.size:
                raise damaged(path, f"has {size} bytes, {entry.size} were written")


def damaged(path: Path, what: str) -> DamagedCheckpoint:
    """The error for a damaged file of a checkpoint; `what` completes "PATH: ..."."""
    return DamagedCheckpoint(
        f"{path}: {what}\n"
        "  why: the checkpoint is damaged or was copied incompletely\n"
        "  fix: copy it again, or continue from an older checkpoint"
    )


def _check_tiles(where: Path, what: str, ranges: list[tuple[int, int]], size: int) -> None:
    at = 0
    for start, stop in sorted(ranges):
        if start != at or stop <= start:
            raise damaged(where, f"slices of {what} leave a gap or overlap at element {min(start, at)}")
        at = stop
    if at != size:
        raise damaged(where, f"slices of {what} cover {at} of {size} elements")


def _json_block(key: str, rows: dict[str, Any]) -> str:
    lines = [f"{json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}" for name, row in rows.items()]
    return f"{json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n}"


def _parameter_to_json(entry: ParameterEntry) -> dict[str, Any]:
    cut: dict[str, Any] | None = None
    if entry.cut is not None:
        places = {"segments": entry.cut.segments} if entry.cut.segments else {"pieces": entry.cut.shards}
        cut = {"dim": entry.cut.dim, **places}
    return {"shape": entry.shape, "cut": cut, "adam_step": entry.adam_step}


def _parameter_from_json(found: dict[str, Any]) -> ParameterEntry:
    shape = tuple(int(size) for size in found["shape"])
    cut = found["cut"]
    if cut is not None:
        if "segments" in cut:
            cut = ShardSpec(int(cut["dim"]), (), segments=tuple(_ranges(found) for found in cut["segments"]))
        else:
            cut = ShardSpec(int(cut["dim"]), _ranges(cut["pieces"]))
        cut.check(shape[cut.dim])
    return ParameterEntry(shape, cut, int(found["adam_step"]))


def _ranges(found: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(start), int(stop)) for start, stop in found)


def _file_to_json(entry: FileEntry) -> dict[str, Any]:
    rows = [[s.name, s.kind, s.tp_rank, s.offset, s.numel] for s in entry.slices]
    return {"size": entry.size, "sha256": entry.sha256, "slices": rows}


def _file_from_json(name: str, found: dict[str, Any]) -> FileEntry:
    if name != Path(name).name:
        raise ValueError(f"{name!r} is not a plain file name")
    slices = tuple(Slice(str(n), str(k), int(t), int(o), int(m)) for n, k, t, o, m in found["slices"])
    return FileEntry(name, int(found["size"]), str(found["sha256"]), slices)


def model_fingerprint(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> str:
    """16 hex digits of the parameters' names and shapes and of the config without VOLATILE keys."""
    stable = {key: value for key, value in config.items() if key not in VOLATILE}
    return sha256_of_json([stable, {name: list(shape) for name, shape in shapes.items()}])[:16]
