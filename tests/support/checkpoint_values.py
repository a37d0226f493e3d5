"""Checkpoints of a few small parameters, written without an engine, in several tensor-parallel layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.checkpoint import Description, write_checkpoint
from kdtrain.engine.manifest import KINDS, Manifest, ParameterEntry
from kdtrain.engine.slices import Fragment, write_rank_file
from kdtrain.parallel.heads import HeadSharding
from kdtrain.parallel.shard_spec import ShardSpec, even_spec, fused_spec, padded_spec
from kdtrain.parallel.shard_tensors import split_tensor

Cuts = dict[str, ShardSpec]

SHAPES = {"embed.weight": (11, 6), "o_proj.weight": (6, 9), "stack.weight": (2, 5, 3), "norm.weight": (6,), "scale": ()}

# tp 1, 2 even and uneven, 3 with one rank that holds only padding, and 3 along another dim of `stack`
LAYOUTS: dict[str, Cuts] = {
    "whole": {},
    "padded to itself": {"embed.weight": padded_spec(0, 11, 1, 16)},
    "two": {
        "embed.weight": padded_spec(0, 11, 2, 8),
        "o_proj.weight": even_spec(1, 9, 2),
        "stack.weight": even_spec(0, 2, 2),
    },
    "three": {
        "embed.weight": padded_spec(0, 11, 3, 8),
        "o_proj.weight": ShardSpec(1, ((0, 6), (6, 6), (6, 9))),
        "stack.weight": even_spec(1, 5, 3),
    },
    # as fused projections are cut, whose ranks hold several ranges
    "fused": {
        "embed.weight": fused_spec([even_spec(0, 5, 2), even_spec(0, 3, 2), even_spec(0, 3, 2)]),
        "o_proj.weight": fused_spec([even_spec(1, 4, 2), even_spec(1, 5, 2)]),
        "norm.weight": fused_spec([even_spec(0, 2, 2), even_spec(0, 2, 2), even_spec(0, 2, 2)]),
    },
    # as key and value projections of two heads are cut over five ranks
    "shared": {
        "embed.weight": padded_spec(0, 11, 5, 8),
        "norm.weight": HeadSharding.of(6, 2, 5).key_value_spec(0, 3),
        "stack.weight": HeadSharding.of(6, 2, 5).key_value_spec(0, 1),
    },
}


def values(name: str, kind: str) -> Tensor:
    """A whole parameter or moment: consecutive numbers that no other one has."""
    size = math.prod(SHAPES[name])
    begin = 1 + 1000 * list(SHAPES).index(name) + 100 * KINDS.index(kind)
    return torch.arange(begin, begin + size, dtype=torch.float32).reshape(SHAPES[name])


def fragments(cuts: Cuts, pieces_of: Callable[[int], list[int]] = lambda size: [size]) -> list[Fragment]:
    """The fragments of all tp ranks; pieces_of: sizes into which a flat shard is divided."""
    found = []
    for name in SHAPES:
        cut = cuts.get(name)
        for kind in KINDS:
            for tp_rank in range(1 if cut is None else cut.tp_size):
                if cut is not None and cut.is_replica(tp_rank):
                    continue
                unpadded = None if cut is None else replace(cut, padded=None)
                flat = split_tensor(values(name, kind), unpadded, tp_rank).flatten()
                at = 0
                for size in pieces_of(flat.numel()):
                    found.append(Fragment(name, kind, tp_rank, at, flat[at : at + size]))
                    at += size
                assert at == flat.numel()
    return found


def ragged(size: int) -> list[int]:
    """1, 2, 3, ... elements, then the rest."""
    sizes, step = [], 1
    while size:
        sizes.append(min(step, size))
        size -= sizes[-1]
        step += 1
    return sizes


def about(cuts: Cuts | None = None, step: int = 7, state: dict[str, Any] | None = None) -> Description:
    """The description of a checkpoint of these parameters."""
    return Description(step, SHAPES, cuts or {}, {"tp": 1}, {"model_type": "none"}, state or {"tokens": 5})


def write(
    root: Path,
    cuts: Cuts | None = None,
    *,
    step: int = 7,
    state: dict[str, Any] | None = None,
    pieces_of: Callable[[int], list[int]] = ragged,
) -> Path:
    """A checkpoint by the plain write; its folder."""
    cuts = cuts or {}
    return write_checkpoint(
        root, Mesh(), about(cuts, step, state), fragments(cuts, pieces_of), dict.fromkeys(SHAPES, 3)
    )


def write_scattered(folder: Path, cuts: Cuts, ranks: int = 4) -> Path:
    """Write as several ranks do: fragments distributed over files in turn."""
    folder.mkdir()
    dealt = fragments(cuts, ragged)
    files = [write_rank_file(folder / f"rank_{r:05d}.safetensors", dealt[r::ranks]) for r in range(ranks)]
    entries = {n: ParameterEntry(s, replace(cuts[n], padded=None) if n in cuts else None, 3) for n, s in SHAPES.items()}
    manifest = Manifest(7, {"tp": 1}, {}, "0" * 16, entries, tuple(files), {"tokens": 5})
    (folder / "checkpoint.json").write_text(manifest.to_json())
    return folder
