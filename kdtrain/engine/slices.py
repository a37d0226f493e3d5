"""Checkpoint slices on disk: write one rank's file, and read any piece of any parameter in any layout.

Needs neither a process group nor DeepSpeed; files are plain safetensors, without pickle. See
docs/design/0005-checkpoints.md.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdtrain.engine.manifest import FileEntry, Manifest, ParameterEntry, Slice, damaged
from kdtrain.parallel.shard_spec import ShardSpec
from kdtrain.parallel.shard_tensors import read_shard
from kdtrain.stores.checksums import ChecksummedFile


@dataclass(frozen=True, slots=True)
class Fragment:
    """A contiguous flat part of one tp rank's piece of a parameter, padding not included.

    kind: of `manifest.KINDS`. offset: flat, inside the unpadded piece. tensor: 1-D float32, any device.
    """

    name: str
    kind: str
    tp_rank: int
    offset: int
    tensor: Tensor

    def as_slice(self) -> Slice:
        """The entry of this fragment in the manifest."""
        return Slice(self.name, self.kind, self.tp_rank, self.offset, self.tensor.numel())


def write_rank_file(path: Path, fragments: Iterable[Fragment]) -> FileEntry:
    """Write `path` with `write_slices`. One fragment at a time is copied to the host."""
    kept = writable(path, fragments)
    return write_slices(path, [fragment.as_slice() for fragment in kept], (_on_host(f.tensor) for f in kept))


def writable(path: Path, fragments: Iterable[Fragment]) -> list[Fragment]:
    """The non-empty fragments. Raises ValueError for wrong types and for two with the same key."""
    kept = [fragment for fragment in fragments if fragment.tensor.numel()]
    for fragment in kept:
        if fragment.tensor.dim() != 1 or fragment.tensor.dtype != torch.float32:
            raise ValueError(f"{fragment.name}: a fragment is 1-D float32, got {fragment.tensor.dtype}")
    if len({fragment.as_slice().key for fragment in kept}) != len(kept):
        raise ValueError(f"{path.name}: two fragments have the same name, kind, tp rank and offset")
    return kept


def write_slices(path: Path, slices: Sequence[Slice], data: Iterable[memoryview]) -> FileEntry:
    """Write `path` (a safetensors file), flush it to disk and return its entry. data: the slices' bytes in order.

    Written here, not by the safetensors package, so that an error carries its errno and the checksum is computed from
    the bytes in memory, not from those read back. Raises OSError; the file may then be incomplete.
    """
    header: dict[str, Any] = {}
    at = 0
    for s in slices:
        header[s.key] = {"dtype": "F32", "shape": [s.numel], "data_offsets": [at, at + 4 * s.numel]}
        at += 4 * s.numel
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with ChecksummedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in data:
            file.write(block)
        return FileEntry(path.name, 8 + len(text) + at, file.commit(), tuple(slices))


def _on_host(tensor: Tensor) -> memoryview:
    values: Any = tensor.detach().cpu().contiguous().numpy()
    return memoryview(values).cast("B")


class CheckpointReader:
    """One checkpoint folder; a context manager. Opening it reads checkpoint.json and the sizes of all files.

    Every error is a CheckpointError that names the file. Does not communicate.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.manifest.check_files(folder)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._slices: dict[tuple[str, str], list[tuple[int, Slice, str]]] = defaultdict(list)
        for entry in self.manifest.files:
            for s in entry.slices:
                begin = sum(self.manifest.parameters[s.name].pieces()[: s.tp_rank]) + s.offset
                self._slices[s.name, s.kind].append((begin, s, entry.name))

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmap all files."""
        self._stack.close()
        self._open = {}

    def names(self) -> list[str]:
        """Hugging Face names of all parameters, in the model's order."""
        return list(self.manifest.parameters)

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Compare the sha256 of `files` (default: all) with checkpoint.json. Reads every byte of them."""
        wanted = None if files is None else set(files)
        for entry in self.manifest.files:
            if wanted is not None and entry.name not in wanted:
                continue
            path = self.folder / entry.name
            try:
                found = entry.other_sha256(self.folder)
            except OSError as error:
                raise damaged(path, f"cannot be read: [Errno {error.errno}] {error.strerror}") from error
            if found is not None:
                raise damaged(path, f"has sha256 {found}, {entry.sha256} was written")

    def read_full(self, name: str, kind: str) -> Tensor:
        """The full, unpadded parameter (or moment), float32 on the CPU."""
        shape = self.manifest.parameters[name].shape
        return self._read_part(name, kind, 0, 0, shape[0]) if shape else self._read_saved(name, kind, 0, 1).reshape(())

    def read_shard(self, name: str, kind: str, cut: ShardSpec | None, tp_rank: int) -> Tensor:
        """What `tp_rank` holds under `cut` (None: all of it), zero padding included, float32 on the CPU."""
        if cut is None:
            return self.read_full(name, kind)
        return read_shard(partial(self._read_part, name, kind, cut.dim), cut, tp_rank)

    def read_range(self, name: str, kind: str, cut: ShardSpec | None, tp_rank: int, start: int, stop: int) -> Tensor:
        """Flat elements [start, stop) of `read_shard`; past the shard's end, zeros. Reads only what is needed."""
        if cut is not None and cut.padded is not None and cut.dim != 0:
            raise ValueError(f"{name}: only a cut along dim 0 can be padded, else padding is not at the end")
        entry = self.manifest.parameters[name]
        now = ParameterEntry(entry.shape, cut, entry.adam_step)
        same_cut = cut and entry.cut and not cut.shared and _places(cut) == _places(entry.cut)
        same_order = same_cut or (_by_rows(now) and _by_rows(entry))
        piece = 0 if cut is None else tp_rank
        size = now.held(piece)
        out = torch.zeros(stop - start)
        begin, end = min(start, size), min(stop, size)
        if begin == end:
            return out
        if same_order:
            origin = sum(now.pieces()[:piece])
            out[: end - begin] = self._read_saved(name, kind, origin + begin, origin + end)
        else:
            out[: end - begin] = self.read_shard(name, kind, cut, tp_rank).flatten()[begin:end]
        return out

    def _read_part(self, name: str, kind: str, dim: int, start: int, stop: int) -> Tensor:
        """Indices [start, stop) along `dim` of the full parameter."""
        entry = self.manifest.parameters[name]
        shape = entry.shape
        if dim == 0 and _by_rows(entry):
            row = math.prod(shape[1:])
            return self._read_saved(name, kind, start * row, stop * row).reshape(stop - start, *shape[1:])
        out = torch.empty(*shape[:dim], stop - start, *shape[dim + 1 :])
        at = 0
        old_dim = 0 if entry.cut is None else entry.cut.dim
        for tp_rank, numel in enumerate(entry.pieces()):
            ranges = ((0, shape[0]),) if entry.cut is None else entry.cut.ranges(tp_rank)
            if numel and (old_dim != dim or any(low < stop and start < high for low, high in ranges)):
                old = self._read_saved(name, kind, at, at + numel)
                old = old.reshape(*shape[:old_dim], -1, *shape[old_dim + 1 :])
                _copy_overlap(out, old, ranges, (old_dim, dim), (start, stop))
            at += numel
        return out

    def _read_saved(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in saved order; `Manifest.read` has checked that the slices cover them."""
        out = torch.empty(stop - start)
        for begin, s, file in self._slices[name, kind]:
            low, high = max(begin, start), min(begin + s.numel, stop)
            if low < high:
                out[low - start : high - start] = self._read_slice(file, s, low - begin, high - begin)
        return out

    def _read_slice(self, file: str, s: Slice, start: int, stop: int) -> Tensor:
        path = self.folder / file
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(path, framework="pt"))
            view = self._open[file].get_slice(s.key)
            found = (view.get_dtype(), list(view.get_shape()))
            if found != ("F32", [s.numel]):
                raise damaged(path, f"{s.key!r} is {found}, {('F32', [s.numel])} in checkpoint.json")
            values: Tensor = view[start:stop]
        except (SafetensorError, OSError) as error:
            raise damaged(path, f"{s.key!r} cannot be read: {error}") from error
        return values


def _by_rows(entry: ParameterEntry) -> bool:
    """Whether the saved order of `entry` is the row-major order of the full parameter."""
    return entry.cut is None or (entry.cut.dim == 0 and entry.cut.in_order)


def _places(cut: ShardSpec) -> tuple[object, ...]:
    """All of a cut but its padding."""
    return cut.dim, cut.shards, cut.segments


def _copy_overlap(
    out: Tensor, old: Tensor, ranges: Iterable[tuple[int, int]], dims: tuple[int, int], wanted: tuple[int, int]
) -> None:
    """From a saved piece, which holds `ranges` along dims[0], copy to `out` what is `wanted` of dims[1]."""
    (old_dim, dim), (start, stop) = dims, wanted
    at = 0
    for low, high in ranges:
        if old_dim != dim:
            some = old.narrow(old_dim, at, high - low).narrow(dim, start, stop - start)
            out.narrow(old_dim, low, high - low).copy_(some)
        elif (begin := max(low, start)) < (end := min(high, stop)):
            out.narrow(dim, begin - start, end - begin).copy_(old.narrow(dim, at + begin - low, end - begin))
        at += high - low
