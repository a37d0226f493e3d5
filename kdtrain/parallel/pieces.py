"""This rank's piece of a full tensor, and the full tensor from every rank's piece. Does not communicate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kdtrain.parallel.cut import Cut


def split_tensor(full: Tensor, cut: Cut | None, tp_rank: int) -> Tensor:
    """This rank's piece as its own contiguous tensor, padded with zeros where the cut says so; None: all of it."""
    if cut is None:
        return full.clone(memory_format=torch.contiguous_format)
    return read_piece(lambda start, stop: full.narrow(cut.dim, start, stop - start), cut, tp_rank)


def read_piece(read: Callable[[int, int], Tensor], cut: Cut, tp_rank: int) -> Tensor:
    """This rank's piece, padded, from read(start, stop): elements [start, stop) of the full one along the cut dim."""
    parts = [read(start, stop) for start, stop in cut.ranges(tp_rank)]
    return pad_piece(parts[0] if len(parts) == 1 else torch.cat(parts, cut.dim), cut)


def pad_piece(piece: Tensor, cut: Cut) -> Tensor:
    """A contiguous copy of `piece`, filled up with zeros to the cut's local size."""
    size = piece.shape[cut.dim] if cut.padded is None else cut.padded
    local = piece.new_zeros((*piece.shape[: cut.dim], size, *piece.shape[cut.dim + 1 :]))
    local.narrow(cut.dim, 0, piece.shape[cut.dim]).copy_(piece)
    return local


def merge_tensors(pieces: Sequence[Tensor], cut: Cut | None) -> Tensor:
    """The full tensor from every tp rank's piece, padding dropped. With cut None the first piece stands for all."""
    if cut is None:
        return pieces[0]
    full = pieces[0].new_empty(cut.full_shape(tuple(pieces[0].shape)))
    for tp_rank, piece in enumerate(pieces):
        if not cut.is_copy(tp_rank):
            place_piece(full, piece, cut, tp_rank)
    return full


def place_piece(full: Tensor, piece: Tensor, cut: Cut, tp_rank: int) -> Tensor:
    """Copy a rank's piece, padding left out, to its places in `full`, and return `full`."""
    at = 0
    for start, stop in cut.ranges(tp_rank):
        full.narrow(cut.dim, start, stop - start).copy_(piece.narrow(cut.dim, at, stop - start))
        at += stop - start
    return full


def split_state_dict(full: Mapping[str, Tensor], cuts: Mapping[str, Cut], tp_rank: int) -> dict[str, Tensor]:
    """Every tensor of `full` as this rank holds it; names without a cut are replicated."""
    return {name: split_tensor(tensor, cuts.get(name), tp_rank) for name, tensor in full.items()}


def merge_state_dict(shards: Sequence[Mapping[str, Tensor]], cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
    """The inverse of `split_state_dict`: one state dict per tp rank, in rank order, to the full one.

    Raises ValueError when the ranks disagree about names.
    """
    names = list(shards[0])
    for rank, state in enumerate(shards):
        if set(state) != set(names):
            raise ValueError(f"tp rank {rank} and tp rank 0 differ in names: {sorted(set(state) ^ set(names))[:5]}")
    return {name: merge_tensors([state[name] for state in shards], cuts.get(name)) for name in names}
