"""Ulysses: attention over sequences that are divided over a cp group (Jacobs et al. 2023, arXiv 2309.14509).

Everything but attention works token by token, on this rank's S / cp tokens of every sequence. For attention an
all-to-all gives each rank all tokens of heads / cp heads; it computes stock attention on them, and a second all-to-all
restores the division by token. Two all-to-alls per layer forward, two backward; each rank sends about
(heads of q + k + v + output) * S / cp values, for any cp.

B sequences, s = S / cp tokens on this rank, H heads on this rank before the exchange, d their width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtrain.distributed.collectives import Group, exchange_ranks, group_size, transfer
from kdtrain.errors import ParallelError


def check_heads(query_heads: int, cp_size: int, what: str) -> None:
    """Raises ParallelError, on all ranks alike, unless cp_size divides query_heads."""
    if query_heads % cp_size:
        possible = [n for n in range(1, query_heads + 1) if query_heads % n == 0]
        raise ParallelError(
            f"parallel.cp = {cp_size} does not divide the {query_heads} query heads on a rank of {what}\n"
            "  why: for attention the ranks of a cp group divide the heads evenly\n"
            f"  fix: set parallel.cp to one of {possible}, or another parallel.tp"
        )


def gather_sequence(
    query: Tensor, key: Tensor, value: Tensor, group: Group, *, what: str = "this model"
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, s, d] each -> [B, H / cp, S, d]: all tokens of this rank's share of the heads; differentiable.

    key and value may have fewer heads (H a multiple of theirs) and value another width. Their heads are repeated until
    cp divides their number; query head j of the result uses key head j // (query heads / key heads).
    Communicates: one all-to-all, in backward one. Raises ParallelError when cp does not divide the query heads.
    """
    cp_size = group_size(group)
    if cp_size == 1:
        return query, key, value
    check_heads(query.shape[1], cp_size, what)
    parts = [_by_rank(x, cp_size) for x in (query, _enough_heads(key, cp_size), _enough_heads(value, cp_size))]
    # Each rank has its tokens of all heads; attention needs all tokens of a head on one rank.
    flat = _exchange(torch.cat([part.flatten(1) for part in parts], dim=1), group)
    received = torch.split(flat, [part[0].numel() for part in parts], dim=1)
    # from [ranks (parts of the sequence), B, H / cp, s, d]
    q, k, v = (x.view_as(y).permute(1, 2, 0, 3, 4).flatten(2, 3) for x, y in zip(received, parts, strict=True))
    return q, k, v


def scatter_sequence(output: Tensor, group: Group) -> Tensor:
    """[B, S, H / cp, d] -> [B, s, H, d]: the attention output of all heads for this rank's tokens.

    Differentiable. Communicates: one all-to-all, in backward one.
    """
    cp_size = group_size(group)
    if cp_size == 1:
        return output
    parts = output.reshape(output.shape[0], cp_size, -1, *output.shape[2:]).transpose(0, 1)  # [ranks, B, s, H / cp, d]
    # The layers after attention work on this rank's tokens and need all heads of them.
    return _exchange(parts, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _exchange(x: Tensor, group: Group) -> Tensor:
    """[cp, n] -> [cp, n], row j to rank j. An all-to-all is a permutation of values: its backward is itself.

    exchange_ranks makes a non-contiguous gradient contiguous first: the collective would write it in the wrong order.
    """
    return transfer(x, group, exchange_ranks, exchange_ranks)


def _by_rank(x: Tensor, cp_size: int) -> Tensor:
    """[B, H, s, d] -> [cp, B, H / cp, s, d]"""
    return x.reshape(x.shape[0], cp_size, -1, *x.shape[2:]).transpose(0, 1)


def _enough_heads(x: Tensor, cp_size: int) -> Tensor:
    """Heads of keys or values, each repeated beside itself until cp_size divides their number."""
    return x.repeat_interleave(cp_size // math.gcd(x.shape[1], cp_size), dim=1)
