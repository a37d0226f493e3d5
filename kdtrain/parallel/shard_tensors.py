"""Split full tensors into shards and merge shards into full tensors. Does not communicate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kdtrain.parallel.shard_spec import ShardSpec


def split_tensor(full: Tensor, spec: ShardSpec | None, tp_rank: int) -> Tensor:
    """This rank's shard as a new contiguous tensor, padded with zeros if spec.padded; all of it if spec is None."""
    if spec is None:
        return full.clone(memory_format=torch.contiguous_format)
    return read_shard(lambda start, stop: full.narrow(spec.dim, start, stop - start), spec, tp_rank)


def read_shard(read: Callable[[int, int], Tensor], spec: ShardSpec, tp_rank: int) -> Tensor:
    """This rank's shard, padded, from read(start, stop): elements [start, stop) of the full tensor along spec.dim."""
    parts = [read(start, stop) for start, stop in spec.ranges(tp_rank)]
    return pad_shard(parts[0] if len(parts) == 1 else torch.cat(parts, spec.dim), spec)


def pad_shard(shard: Tensor, spec: ShardSpec) -> Tensor:
    """A contiguous copy of `shard`, padded with zeros to the local size of `spec`."""
    size = shard.shape[spec.dim] if spec.padded is None else spec.padded
    local = shard.new_zeros((*shard.shape[: spec.dim], size, *shard.shape[spec.dim + 1 :]))
    local.narrow(spec.dim, 0, shard.shape[spec.dim]).copy_(shard)
    return local


def merge_tensors(shards: Sequence[Tensor], spec: ShardSpec | None) -> Tensor:
    """The full tensor from every tp rank's shard, without padding; with spec None the first rank's tensor."""
    if spec is None:
        return shards[0]
    full = shards[0].new_empty(spec.full_shape(tuple(shards[0].shape)))
    for tp_rank, shard in enumerate(shards):
        if not spec.is_replica(tp_rank):
            copy_shard_into(full, shard, spec, tp_rank)
    return full


def copy_shard_into(full: Tensor, shard: Tensor, spec: ShardSpec, tp_rank: int) -> Tensor:
    """Copy a rank's shard, without padding, into its ranges of `full`, and return `full`."""
    at = 0
    for start, stop in spec.ranges(tp_rank):
        full.narrow(spec.dim, start, stop - start).copy_(shard.narrow(spec.dim, at, stop - start))
        at += stop - start
    return full


def split_state_dict(full: Mapping[str, Tensor], specs: Mapping[str, ShardSpec], tp_rank: int) -> dict[str, Tensor]:
    """This rank's shard of every tensor of `full`, padded with zeros as its spec says, as new contiguous tensors.

    full: name -> full, unpadded tensor; names without a spec are replicated. Does not communicate.
    """
    return {name: split_tensor(tensor, specs.get(name), tp_rank) for name, tensor in full.items()}


def merge_state_dict(shards: Sequence[Mapping[str, Tensor]], specs: Mapping[str, ShardSpec]) -> dict[str, Tensor]:
    """The inverse of `split_state_dict`: one state dict per tp rank, in rank order, to the full one without padding.

    Does not communicate. Raises ValueError when the ranks disagree about names.
    """
    names = list(shards[0])
    for rank, state in enumerate(shards):
        if set(state) != set(names):
            raise ValueError(f"tp rank {rank} and tp rank 0 differ in names: {sorted(set(state) ^ set(names))[:5]}")
    return {name: merge_tensors([state[name] for state in shards], specs.get(name)) for name in names}
