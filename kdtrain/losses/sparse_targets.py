"""Sparse records of a teacher: their kind, their validity, and merging of ids that were drawn several times.

T tokens, K slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdtrain.losses.types import SparseTarget

SUM_TOLERANCE = 1e-2
"""Largest deviation from 1 of the sum of a token's weights and tail; allows for storage in half precision."""


def target_kind(target: SparseTarget, renormalise_student: bool = False) -> str:
    """The name in `matrix.TARGETS` for a loss on this record. Reads no tensor's contents."""
    if renormalise_student:
        return "conditional"
    if target.unbiased:
        return "sampled"
    return "top_k" if target.log_tail is None else "top_k_tail"


def merge_duplicates(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Every id of a row once, with the sum of its weights; freed slots are empty (id -1, weight 0).

    ids [T, K] integers, -1 in empty slots, whose weights must be 0; weights [T, K]. Returns the same shapes and dtypes,
    ids ascending from -1. For records of draws with replacement. Does not communicate. Raises ValueError for
    different shapes.
    """
    if ids.ndim != 2 or ids.shape != weights.shape:
        raise ValueError(f"ids have shape {tuple(ids.shape)}, weights {tuple(weights.shape)}; need one [T, K]")
    ordered, order = ids.long().sort(1)
    is_new = torch.ones_like(ordered)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    slot = is_new.cumsum(1) - 1
    summed = torch.zeros_like(weights, dtype=torch.float64).scatter_add_(1, slot, weights.gather(1, order).double())
    kept = torch.full_like(ordered, -1).scatter_(1, slot, ordered)
    return kept.to(ids.dtype), summed.to(weights.dtype)


def check_target_shapes(target: SparseTarget, hidden: Tensor) -> None:
    """Require ids and weights [T, K] with K >= 1, log_tail and entropy [T], on hidden's device. Raises ValueError."""
    ids, weights, num_tokens = target.ids, target.weights, hidden.shape[0]
    if ids.ndim != 2 or ids.shape[0] != num_tokens or ids.shape[1] == 0:
        raise ValueError(f"target.ids has shape {tuple(ids.shape)}, need ({num_tokens}, K) with K >= 1")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"target.ids has dtype {ids.dtype}, need int32 or int64")
    expected = {"weights": (weights, tuple(ids.shape)), "entropy": (target.entropy, (num_tokens,))}
    if target.log_tail is not None:
        expected["log_tail"] = (target.log_tail, (num_tokens,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"target.{name} has shape {tuple(tensor.shape)}, need {shape}")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"target.{name} has dtype {tensor.dtype}, need a floating-point one")
    for name, tensor in {"ids": ids, **{key: value[0] for key, value in expected.items()}}.items():
        if tensor.device != hidden.device:
            raise ValueError(f"target.{name} is on {tensor.device}, need {hidden.device} as the hidden states")
    if target.unbiased and target.log_tail is not None:
        raise ValueError("target.unbiased = True with a log_tail: an unbiased estimate has its tail in its samples")


def check_target_contents(target: SparseTarget, kd_weight: Tensor, vocab_size: int) -> None:
    """Require ids that are tokens or -1, none twice in a row, and valid weights wherever kd_weight is not 0.

    Raises ValueError on the CPU, naming the first bad token; elsewhere by assertions on the device.
    """
    ids, weights = target.ids, target.weights
    ordered = ids.sort(1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    counts = kd_weight != 0
    _refuse((ids < -1).any(1) | (ids >= vocab_size).any(1), ids, f"target.ids need be in [0, {vocab_size}), or -1")
    _refuse(twice, ids, "target.ids hold an id twice; merge_duplicates merges them")
    unsound = ~weights.isfinite() | (weights < 0) | ((ids < 0) & (weights != 0))
    _refuse(counts & unsound.any(1), weights, "target.weights need be finite, >= 0, and 0 where the id is -1")
    if target.unbiased:
        unknown = ~target.entropy.isfinite()
        _refuse(counts & unknown, target.entropy, "target.entropy needs be finite: an unbiased loss is measured by it")
    if target.log_tail is not None:
        total = weights.double().sum(1) + target.log_tail.double().exp()
        unequal = ~((total - 1).abs() <= SUM_TOLERANCE)
        _refuse(counts & unequal, total, "target.weights and exp(target.log_tail) need sum to 1")


def _refuse(bad: Tensor, shown: Tensor, rule: str) -> None:
    """bad [T] bool must be False everywhere; shown [T, ...]: the values to name."""
    if bad.device.type != "cpu":
        torch._assert_async(~bad.any())
    elif bool(bad.any()):
        token = int(bad.nonzero()[0])
        raise ValueError(f"{rule}; token {token} has {shown[token].tolist()}")
