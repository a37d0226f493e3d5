"""Divergences: value and slope q * d phi / d q on a block of rows, and what each of them is.

With D = sum_v phi(p_v, q_v) and x = student logits / temperature,

    dD/dx_v = a_v - q_v Z,      a = q * d phi / d q,      Z = sum_u a_u           (docs/design/0004-streamed-loss.md)

Adding c * q to `a` changes Z by c and leaves the gradient unchanged, so slopes are chosen to be exactly 0 where p = q.
Everything is expressed in p, q and d = log p - log q, which stays accurate where p or q underflows. A divergence is one
function (spec, block) -> (value summed over the block's columns [b], a [b, n]) and one row in DIVERGENCES. logit_mse
uses the uniform distribution in place of q (`uniform_baseline`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
class Parameter:
    """A parameter of a divergence.

    low, high: its range, whose ends belong to it as `ends` says ("[]", "[)", "(]" or "()"); why: added to the message
    about a value outside. least_size: a value other than 0 is at least this large in size.
    """

    default: float
    low: float = -math.inf
    high: float = math.inf
    ends: str = "()"
    why: str = ""
    least_size: float = 0.0

    def rule(self, value: float) -> str:
        """What `value` violates; empty if it is allowed."""
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        if not (above and below):
            return f"must be in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}{self.why}"
        if 0 < abs(value) < self.least_size:
            return f"must be 0 or at least {self.least_size:g} in size"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """What a divergence is: a row of DIVERGENCES.

    terms: (spec, block) -> (value [b], slope [b, n]). parameters: by name, in the order of `rule` and `limits`. rule:
    their values -> what they violate together, or empty. limits: values with which it is a plain KL -> that KL's name.
    two_rounds: Z needs a second pass over the logits and a second exchange between ranks; False only where
    `merge_pair_stats` knows Z. uniform_baseline: the gradient is a - Z / vocabulary instead of a - q Z. f_divergence:
    D = sum q f(p / q) with convex f, so merging ids never increases it; without this a sparse record is refused.
    infinite_at_zero: infinite where the teacher's probability is 0 and the student's is not.
    """

    terms: Callable[[DivergenceSpec, PairBlock], Terms]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    rule: Callable[..., str] | None = None
    limits: Mapping[tuple[float, ...], str] = field(default_factory=dict)
    two_rounds: bool = True
    uniform_baseline: bool = False
    f_divergence: bool = False
    infinite_at_zero: bool = False


@dataclass(frozen=True, slots=True)
class DivergenceSpec:
    """A divergence with its parameters and its temperature: one value, hashable. Build it with `divergence_spec`.

    name, kernel: keys of DIVERGENCES. `kernel` differs from `name` where a parameter at an end of its range makes the
    divergence a plain KL. temperature: divides both models' logits. parameters: (name, value) of those it has.
    """

    name: str
    kernel: str
    temperature: float
    parameters: tuple[tuple[str, float], ...]

    def __getitem__(self, parameter: str) -> float:
        """The value of a parameter. Raises KeyError for one of another divergence."""
        return dict(self.parameters)[parameter]

    @property
    def row(self) -> Divergence:
        """What is computed: the row of `kernel`."""
        return DIVERGENCES[self.kernel]

    def terms(self, block: PairBlock) -> Terms:
        """(value summed over the block's columns [b], slope [b, n])."""
        return self.row.terms(self, block)

    def from_sums(self, summed: Tensor, z: Tensor) -> Tensor:
        """D [T] from the values of `terms` summed over the whole vocabulary, clamped at 0."""
        if self.row.uniform_baseline:  # mean of squares minus square of the mean; z is -2 times the mean
            summed = summed - (z / 2).square()
        return summed.clamp(min=0.0)


def divergence_spec(name: str, *, temperature: float = 1.0, **parameters: float) -> DivergenceSpec:
    """The checked divergence; parameters that are left out have their defaults.

    Raises ValueError naming the argument, its value and what is allowed.
    """
    if name not in DIVERGENCES:
        _refuse("divergence", repr(name), f"is unknown; choose one of {', '.join(DIVERGENCES)}")
    check_temperature(temperature)
    row = DIVERGENCES[name]
    for parameter, value in parameters.items():
        if parameter not in row.parameters:
            owners = [owner for owner, other in DIVERGENCES.items() if parameter in other.parameters]
            whose = f"belongs to {' and '.join(owners)}" if owners else "is unknown"
            _refuse(parameter, value, f"{whose}; leave it out for {name}")
        if not hasattr(value, "__float__"):  # float() would also read a string
            _refuse(parameter, repr(value), "must be a number")
    values = {parameter: float(parameters.get(parameter, of.default)) for parameter, of in row.parameters.items()}
    for parameter, of in row.parameters.items():
        if rule := of.rule(values[parameter]):
            _refuse(parameter, values[parameter], rule)
    if row.rule is not None and (rule := row.rule(*values.values())):
        _refuse(", ".join(values), ", ".join(map(str, values.values())), rule)
    kernel = row.limits.get(tuple(values.values()), name)
    return DivergenceSpec(name, kernel, float(temperature), tuple(values.items()))


def check_temperature(temperature: float) -> None:
    """Require a number whose square and inverse square are representable in float32; raises ValueError."""
    if isinstance(temperature, bool) or not 1e-9 <= temperature <= 1e9:
        raise ValueError(f"temperature = {temperature}, need a finite number > 0 (in [1e-9, 1e9])")


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
    b = spec["teacher_share"]
    p_over_m, q_over_m = _log_mean_pair(block.log_ratio(), b, block.spare())
    value = p_over_m.mul_(block.p()).sum(1) / (1 - b)
    slope = q_over_m.mul_(block.q()).div_(b)
    return value + slope.sum(1), slope


def _skew_kl(spec: DivergenceSpec, block: PairBlock) -> Terms:
    p_over_m, _ = _log_mean_pair(block.log_ratio(), spec["skew"], block.spare())
    value = torch.mul(p_over_m, block.p(), out=block.spare(1)).sum(1)
    # -(1 - skew) p q / m + (1 - skew) q
    return value, p_over_m.expm1_().mul_(block.q()).mul_(spec["skew"] - 1)


def _skew_reverse_kl(spec: DivergenceSpec, block: PairBlock) -> Terms:
    _, q_over_m = _log_mean_pair(block.log_ratio(), 1 - spec["skew"], block.spare())
    q = block.q()
    value = torch.mul(q, q_over_m, out=block.spare(1)).sum(1)
    # q (log(q / m) + 1 - skew q / m) - (1 - skew) q
    excess = torch.expm1(q_over_m, out=block.spare(1))
    return value, q_over_m.sub_(excess, alpha=spec["skew"]).mul_(q)


def _tvd(spec: DivergenceSpec, block: PairBlock) -> Terms:
    p, q = block.p(), block.q()
    gap = torch.sub(q, p, out=block.spare())
    slope = p.copy_(gap).sign_().mul_(q).mul_(0.5)
    return gap.abs_().sum(1) / 2, slope


def _alpha_beta(spec: DivergenceSpec, block: PairBlock) -> Terms:
    """phi = (T(a + b) - T(a)) / b with T(k) = q^(a+b) (e^(k d) - 1) / k, and q phi' = -T(a); limits at 0 included."""
    a, b = spec["ab_alpha"], spec["ab_beta"]
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
    value = torch.mul(d, d, out=block.spare()).sum(1) / block.vocab_size
    return value, d.mul_(-2.0 / block.vocab_size)


def _exponents_rule(alpha: float, beta: float) -> str:
    return "" if alpha + beta > 0 else "must be finite and their sum above 0"


_SKEW = Parameter(0.1, 0, 1, "[)", why=": at 1 the divergence is 0 for every student")
_EXPONENT = Parameter(0.5, least_size=LEAST_EXPONENT)

DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(terms=_forward_kl, two_rounds=False, f_divergence=True),
    "reverse_kl": Divergence(terms=_reverse_kl, two_rounds=False, f_divergence=True, infinite_at_zero=True),
    "jsd": Divergence(
        terms=_jsd,
        parameters={"teacher_share": Parameter(0.5, 0, 1, "[]")},
        limits={(0.0,): "forward_kl", (1.0,): "reverse_kl"},
        f_divergence=True,
    ),
    "skew_kl": Divergence(terms=_skew_kl, parameters={"skew": _SKEW}, limits={(0.0,): "forward_kl"}, f_divergence=True),
    "skew_reverse_kl": Divergence(
        terms=_skew_reverse_kl, parameters={"skew": _SKEW}, limits={(0.0,): "reverse_kl"}, f_divergence=True
    ),
    "tvd": Divergence(terms=_tvd, f_divergence=True),
    "alpha_beta": Divergence(
        terms=_alpha_beta,
        parameters={"ab_alpha": _EXPONENT, "ab_beta": _EXPONENT},
        rule=_exponents_rule,
        limits={(1.0, 0.0): "forward_kl", (0.0, 1.0): "reverse_kl"},
    ),
    "logit_mse": Divergence(terms=_logit_mse, uniform_baseline=True),
}
"""Name in the configuration -> what it is."""
