"""Estimators of a teacher's distribution: which ids keep their exact probability and how the rest is represented.

C tokens, L ids of a list in descending order of probability. Nothing here communicates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ESTIMATORS = ("top_k", "top_k_tail", "top_p_k", "random_sampling", "top_k_samples", "adaptive_threshold")
"""top_k: the k largest, renormalised. top_k_tail: the k largest with exact probabilities, the rest as one tail bucket.
top_p_k: of the k largest the shortest prefix with mass top_p, the rest as one tail bucket. random_sampling: k draws.
top_k_samples: the k - tail_samples largest exactly, tail_samples draws from the rest. adaptive_threshold: every id with
p >= tau0 exactly, draws of weight tau0 from the rest, with tau0 such that the total is k ids."""

WITH_TAIL = ("top_k_tail", "top_p_k")
"""Estimators with a tail bucket: their weights sum to less than 1."""

UNBIASED = ("random_sampling", "top_k_samples", "adaptive_threshold")
"""Estimators that draw; the expectation of their weights is the distribution itself."""


@dataclass(frozen=True, slots=True)
class Split:
    """A chunk divided. weights [C, L] float64 of the listed ids, 0 from index kept[c] on; kept, draws [C] int64: number
    of ids kept, and of draws from all other ids; log_rest [C] float64: log probability of all other ids."""

    weights: Tensor
    kept: Tensor
    draws: Tensor
    log_rest: Tensor


@dataclass(frozen=True, slots=True)
class Estimator:
    """One of ESTIMATORS with its k and its own setting; made by `of`."""

    name: str
    k: int
    tail_samples: int
    top_p: float

    @classmethod
    def of(cls, name: str, k: int, tail_samples: int | None, top_p: float | None) -> Estimator:
        """Raises ValueError for an unknown name and for a setting that is missing, invalid or of another estimator."""
        if name not in ESTIMATORS:
            raise ValueError(f"estimator = {name!r} is unknown; choose one of {', '.join(ESTIMATORS)}")
        for setting, value, owner in (("tail_samples", tail_samples, "top_k_samples"), ("top_p", top_p, "top_p_k")):
            if value is not None and name != owner:
                raise ValueError(f"{setting} = {value} belongs to {owner}; leave it out for {name}")
        if name == "top_k_samples" and (not isinstance(tail_samples, int) or not 1 <= tail_samples < k):
            raise ValueError(f"tail_samples = {tail_samples}, need an integer in [1, k) with k = {k}")
        if name == "top_p_k" and (top_p is None or not 0 < top_p <= 1):
            raise ValueError(f"top_p = {top_p}, need a number in (0, 1]")
        return cls(name, k, tail_samples or 0, 1.0 if top_p is None else top_p)

    @property
    def list_length(self) -> int:
        """How many of the largest ids the selection must find; at least 1."""
        return 1 if self.name == "random_sampling" else self.k - self.tail_samples

    @property
    def most_draws(self) -> int:
        """Upper bound of the draws per token; they take the last slots."""
        if self.name == "top_k_samples":
            return self.tail_samples
        return self.k if self.name in UNBIASED else 0

    def split(self, log_p: Tensor, log_tail: Tensor) -> Split:
        """log_p [C, L] float64, descending; log_tail [C] float64, log of the probability outside the list."""
        length = log_p.shape[1]
        # rest[:, j]: log of the probability outside the first j, smallest first
        rest = torch.cat([log_tail[:, None], log_p.flip(1)], 1).logcumsumexp(1).flip(1)
        kept = torch.full_like(log_tail, length, dtype=torch.int64)
        if self.name == "random_sampling":
            kept.zero_()
        elif self.name == "top_p_k":
            kept = (log_p.exp().cumsum(1) < self.top_p).sum(1).add_(1).clamp_(max=length)
        elif self.name == "adaptive_threshold":
            kept = _above_threshold(log_p, rest)
        log_rest = rest.gather(1, kept[:, None])[:, 0]
        draws = (self.k - kept if self.name in UNBIASED else torch.zeros_like(kept)).where(log_rest > -torch.inf, 0)
        if self.name == "top_k":
            log_p = log_p - log_p.logsumexp(1, keepdim=True)
        is_kept = torch.arange(length, device=kept.device) < kept[:, None]
        return Split(log_p.exp().where(is_kept & (log_p > -torch.inf), 0.0), kept, draws, log_rest)


def _above_threshold(log_p: Tensor, rest: Tensor) -> Tensor:
    """[C] how many ids have p >= tau0, where that number plus (mass below tau0) / tau0 is L.

    With j ids kept, tau0 would be rest_j / (L - j); the answer is the first j whose next id has a smaller p than that.
    """
    length = log_p.shape[1]
    left = torch.arange(length, 0, -1, device=log_p.device, dtype=log_p.dtype)
    is_below = log_p + left.log() < rest[:, :-1]
    return (is_below.cumsum(1) == 0).sum(1)
