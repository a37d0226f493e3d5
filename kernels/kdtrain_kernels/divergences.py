"""Every divergence as a plug-in: D = sum_v phi(p_v, q_v) and q * d phi / d q, elementwise.

With x = student logits / temperature the gradient of any such D is  dD/dx_v = (q phi')_v - q_v Z,  Z = sum q phi'
(our derivation: docs/design/0004-streamed-loss.md). A divergence is therefore two elementwise expressions in
lp = log p, lq = log q, p and q. `z_is_known` marks those whose Z follows from the normalisers alone, which saves a
round of communication and a pass over the logits. logit_mse is not of this family and is handled by its own branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class DivergenceSpec:
    """Which divergence and its parameters; only those the divergence uses are read.

    name: a key of PLUG_INS or "logit_mse". teacher_share: jsd's b. skew: of skew_kl and skew_reverse_kl.
    ab_alpha, ab_beta: exponents of alpha_beta. vocab_size: logit_mse averages over it.
    """

    name: str
    teacher_share: float = 0.5
    skew: float = 0.1
    ab_alpha: float = 0.5
    ab_beta: float = 0.5
    vocab_size: int = 1

    @property
    def z_is_known(self) -> bool:
        """True when no second round over the logits is needed before the gradient."""
        return self.name in ("forward_kl", "reverse_kl", "logit_mse")


def phi_of(spec: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """phi(p, q) per element, in forms whose terms are all of one sign where there is one (no cancellation)."""
    return PLUG_INS[spec.name][0](spec, lp, lq, p, q)


def q_phi_prime_of(spec: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """q * d phi / d q per element; finite where p or q underflows to 0."""
    return PLUG_INS[spec.name][1](spec, lp, lq, p, q)


def _log_mix(la: Tensor, a: float, lb: Tensor, b: float) -> Tensor:
    """log(a e^la + b e^lb) without underflow."""
    return torch.logaddexp(la + math.log(a), lb + math.log(b))


def _gap(la: Tensor, lb: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a (la - lb) - a + b, non-negative; a (la - lb) is 0 where a underflows."""
    return a * (la - lb) - a + b


# Where a sum of phi is a divergence, phi may carry terms that sum to 0 (such as q - p): they make it non-negative.


def _forward_phi(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return _gap(lp, lq, p, q)


def _forward_grad(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return -p


def _reverse_phi(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return _gap(lq, lp, q, p)


def _reverse_grad(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return q * (lq - lp)  # the + q of the derivative cancels in q phi' - q Z


def _jsd_phi(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    b = s.teacher_share
    lm = _log_mix(lp, b, lq, 1 - b)
    m = lm.exp()
    return _gap(lp, lm, p, m) / (1 - b) + _gap(lq, lm, q, m) / b


def _jsd_grad(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    b = s.teacher_share
    return q * (lq - _log_mix(lp, b, lq, 1 - b)) / b


def _skew_phi(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    lm = _log_mix(lp, s.skew, lq, 1 - s.skew)
    return _gap(lp, lm, p, lm.exp())


def _skew_grad(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return -(1 - s.skew) * (lp + lq - _log_mix(lp, s.skew, lq, 1 - s.skew)).exp()


def _skew_reverse_phi(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    lm = _log_mix(lp, 1 - s.skew, lq, s.skew)
    return _gap(lq, lm, q, lm.exp())


def _skew_reverse_grad(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    ratio = lq - _log_mix(lp, 1 - s.skew, lq, s.skew)
    return q * (ratio - s.skew * ratio.exp())


def _tvd_phi(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return 0.5 * (p - q).abs()


def _tvd_grad(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return 0.5 * q * (q - p).sign()


def _alpha_beta_phi(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    a, b = s.ab_alpha, s.ab_beta
    own = a / (a + b) * ((a + b) * lp).exp() + b / (a + b) * ((a + b) * lq).exp()
    return (own - (a * lp + b * lq).exp()) / (a * b)


def _alpha_beta_grad(s: DivergenceSpec, lp: Tensor, lq: Tensor, p: Tensor, q: Tensor) -> Tensor:
    a, b = s.ab_alpha, s.ab_beta
    # q^b (q^a - p^a) / a as one difference of exponentials: q^b alone may underflow while q^(a+b) does not
    return (((a + b) * lq).exp() - (a * lp + b * lq).exp()) / a


PlugIn = Callable[[DivergenceSpec, Tensor, Tensor, Tensor, Tensor], Tensor]

PLUG_INS: dict[str, tuple[PlugIn, PlugIn]] = {
    "forward_kl": (_forward_phi, _forward_grad),
    "reverse_kl": (_reverse_phi, _reverse_grad),
    "jsd": (_jsd_phi, _jsd_grad),
    "skew_kl": (_skew_phi, _skew_grad),
    "skew_reverse_kl": (_skew_reverse_phi, _skew_reverse_grad),
    "tvd": (_tvd_phi, _tvd_grad),
    "alpha_beta": (_alpha_beta_phi, _alpha_beta_grad),
}
"""Name -> (phi, q phi')."""
