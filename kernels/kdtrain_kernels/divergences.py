"""Divergences as plug-ins: value and slope q * d phi / d q on a block of rows.

With D = sum_v phi(p_v, q_v) and x = student logits / temperature,

    dD/dx_v = a_v - q_v Z,      a = q * d phi / d q,      Z = sum_u a_u           (docs/design/0004-streamed-loss.md)

Adding c * q to `a` changes Z by c and leaves the gradient unchanged, so slopes are chosen to be exactly 0 where p = q.
Everything is expressed in p, q and d = log p - log q, which stays accurate where p or q underflows. A plug-in is one
function (spec, block) -> (value summed over the block's columns [b], a [b, n]) and one row in PLUG_INS. logit_mse uses
the uniform distribution in place of q (`uniform_baseline`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from kdtrain_kernels.blocks import PairBlock

Terms = tuple[Tensor, Tensor]

LEAST_EXPONENT = 0.01
"""The value of alpha_beta is a difference divided by an exponent: for smaller exponents float32 cancels completely."""

FAR = 80.0
"""|d| beyond which the smaller of p and q is negligible (e^-80) in sums where its logarithm is bounded."""


@dataclass(frozen=True, slots=True)
class DivergenceSpec:
    """A divergence and its parameters, of which only those it uses are read. Build it with `divergence_spec`.

    kernel: a key of PLUG_INS. It differs from `name` where a parameter at an end of its range makes the divergence
    a plain KL. vocab_size: real tokens of the whole vocabulary.
    """

    name: str
    kernel: str
    teacher_share: float
    skew: float
    ab_alpha: float
    ab_beta: float
    vocab_size: int

    @property
    def two_rounds(self) -> bool:
        """Whether Z needs a second pass over the logits (and a second exchange between ranks)."""
        return self.kernel not in ("forward_kl", "reverse_kl")

    @property
    def uniform_baseline(self) -> bool:
        """Whether the gradient is a - Z / vocab_size instead of a - q Z."""
        return self.kernel == "logit_mse"

    def from_sums(self, summed: Tensor, z: Tensor) -> Tensor:
        """D [T] from the plug-in's values summed over the whole vocabulary, clamped at 0."""
        if self.uniform_baseline:  # mean of squares minus square of the mean; z is -2 times the mean
            summed = summed - (z / 2).square()
        return summed.clamp(min=0.0)


def divergence_spec(
    name: str,
    vocab_size: int,
    *,
    teacher_share: float = 0.5,
    skew: float = 0.1,
    ab_alpha: float = 0.5,
    ab_beta: float = 0.5,
) -> DivergenceSpec:
    """The checked divergence. Raises ValueError naming the argument, its value and what is allowed."""
    kernel = name
    if name not in PLUG_INS:
        _refuse("divergence", repr(name), f"is unknown; choose one of {', '.join(PLUG_INS)}")
    if name == "jsd":
        if not 0 <= teacher_share <= 1:
            _refuse("teacher_share", teacher_share, "must be in [0, 1]")
        kernel = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(teacher_share), name)
    elif name in ("skew_kl", "skew_reverse_kl"):
        if not 0 <= skew < 1:
            _refuse("skew", skew, "must be in [0, 1): at 1 the divergence is 0 for every student")
        kernel = name if skew else {"skew_kl": "forward_kl", "skew_reverse_kl": "reverse_kl"}[name]
    elif name == "alpha_beta":
        exponents = (ab_alpha, ab_beta)
        if not (all(map(math.isfinite, exponents)) and ab_alpha + ab_beta > 0):
            _refuse("ab_alpha, ab_beta", f"{ab_alpha}, {ab_beta}", "must be finite and their sum above 0")
        if any(0 < abs(exponent) < LEAST_EXPONENT for exponent in exponents):
            _refuse("ab_alpha, ab_beta", f"{ab_alpha}, {ab_beta}", f"must be 0 or at least {LEAST_EXPONENT} in size")
        kernel = {(1.0, 0.0): "forward_kl", (0.0, 1.0): "reverse_kl"}.get((float(ab_alpha), float(ab_beta)), name)
    return DivergenceSpec(name, kernel, teacher_share, skew, ab_alpha, ab_beta, vocab_size)


def _refuse(argument: str, value: object, rule: str) -> NoReturn:
    raise ValueError(f"{argument} = {value} {rule}")


def _forward_kl(spec: DivergenceSpec, block: PairBlock) -> Terms:
    p = block.p()
    value = block.log_ratio().mul_(p).sum(1)
    return value, p.neg_()


def _reverse_kl(spec: DivergenceSpec, block: PairBlock) -> Terms:
    slope = block.log_ratio().neg_().mul_(block.q())
    return slope.sum(1), slope


def _log_mean(d: Tensor, share: float, out: Tensor) -> Tensor:
    """log(m / q) for m = share p + (1 - share) q: log(1 + share (e^d - 1)); exactly 0 at d = 0. d is clamped to FAR.

    share <= 1/2, so that 1 + share (e^d - 1) stays away from 0 and no precision is lost at either end.
    """
    return torch.expm1(d.clamp_(-FAR, FAR), out=out).mul_(share).log1p_()


def _log_mean_pair(d: Tensor, share: float, out: Tensor) -> Terms:
    """(log(p / m), log(q / m)) for m = share p + (1 - share) q, expanded around the larger part; overwrites d."""
    if share <= 0.5:
        q_over_m = _log_mean(d, share, out).neg_()
        return d.add_(q_over_m), q_over_m
    p_over_m = _log_mean(d.neg_(), 1 - share, out).neg_()
    return p_over_m, d.add_(p_over_m)  # d holds log q - log p here


def _jsd(spec: DivergenceSpec, block: PairBlock) -> Terms:
    b = spec.teacher_share
    p_over_m, q_over_m = _log_mean_pair(block.log_ratio(), b, block.spare())
    value = p_over_m.mul_(block.p()).sum(1) / (1 - b)
    slope = q_over_m.mul_(block.q()).div_(b)
    return value + slope.sum(1), slope


def _skew_kl(spec: DivergenceSpec, block: PairBlock) -> Terms:
    p_over_m, _ = _log_mean_pair(block.log_ratio(), spec.skew, block.spare())
    value = torch.mul(p_over_m, block.p(), out=block.spare(1)).sum(1)
    # -(1 - skew) p q / m + (1 - skew) q
    return value, p_over_m.expm1_().mul_(block.q()).mul_(spec.skew - 1)


def _skew_reverse_kl(spec: DivergenceSpec, block: PairBlock) -> Terms:
    _, q_over_m = _log_mean_pair(block.log_ratio(), 1 - spec.skew, block.spare())
    q = block.q()
    value = torch.mul(q, q_over_m, out=block.spare(1)).sum(1)
    # q (log(q / m) + 1 - skew q / m) - (1 - skew) q
    excess = torch.expm1(q_over_m, out=block.spare(1))
    return value, q_over_m.sub_(excess, alpha=spec.skew).mul_(q)


def _tvd(spec: DivergenceSpec, block: PairBlock) -> Terms:
    p, q = block.p(), block.q()
    gap = torch.sub(q, p, out=block.spare())
    slope = p.copy_(gap).sign_().mul_(q).mul_(0.5)
    return gap.abs_().sum(1) / 2, slope


def _alpha_beta(spec: DivergenceSpec, block: PairBlock) -> Terms:
    """phi = (T(a + b) - T(a)) / b with T(k) = q^(a+b) (e^(k d) - 1) / k, and q phi' = -T(a); limits at 0 included."""
    a, b = spec.ab_alpha, spec.ab_beta
    mixed = _power_gap(block, a + b, a)
    if b != 0:
        value = (_power_gap(block, a + b, a + b) - mixed).sum(1) / b
    else:  # the limit b -> 0: (p^a d - T(a)) / a
        value = (torch.exp(block.log_p().mul_(a)).mul_(block.log_ratio()) - mixed).sum(1) / a
    return value, mixed.neg_()


def _power_gap(block: PairBlock, power: float, k: float) -> Tensor:
    """q^power (e^(k d) - 1) / k as a new tensor, with one exponential of a sum so that no factor overflows."""
    d = block.log_ratio()
    if k == 0:
        return torch.exp(block.log_q().mul_(power)).mul_(d)
    exponent = block.log_q().mul_(power).add_((d * k).clamp_(min=0.0))
    size = torch.expm1(d.abs().mul_(-abs(k))).neg_().mul_(exponent.exp_())
    return size.mul_(d.sign_()).div_(abs(k))


def _logit_mse(spec: DivergenceSpec, block: PairBlock) -> Terms:
    d = block.log_ratio()
    value = torch.mul(d, d, out=block.spare()).sum(1) / spec.vocab_size
    return value, d.mul_(-2.0 / spec.vocab_size)


PLUG_INS: dict[str, Callable[[DivergenceSpec, PairBlock], Terms]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
    "alpha_beta": _alpha_beta,
    "logit_mse": _logit_mse,
}
"""Name -> (spec, block) -> (value [b], slope [b, n])."""
