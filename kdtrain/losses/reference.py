"""Naive float64 definitions of every loss: the specification all fast paths are tested against.

[T, V] student logits and [T, V] teacher logits -> [T], nats per token, straight from the formulas; one process, no
chunks, differentiable by autograd. p = softmax(teacher / temperature), q = softmax(student / temperature). The
factor temperature^2 is not applied here but in `total_loss`. With dtype=float32 the same functions are the naive
formula whose error and cost the fast paths are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, xlogy

from kdtrain.distributed.vocab import HeadShard


def _log_pair(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    log_q = torch.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)
    return log_q, log_p


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """KL(teacher || student) = sum p log(p / q). Hinton et al. 2015, arXiv 1503.02531."""
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature, dtype)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """KL(student || teacher) = sum q log(q / p). Gu et al. 2023, arXiv 2306.08543."""
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature, dtype)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    teacher_share: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[b KL(p || m) + (1 - b) KL(q || m)] / (b (1 - b)) with m = b p + (1 - b) q, b = teacher_share in [0, 1].

    Agarwal et al. 2023 (arXiv 2306.13649), normalised so that b -> 0 gives forward_kl and b -> 1 reverse_kl;
    the ends are those limits.
    """
    b = teacher_share
    if b in (0, 1):
        limit = reverse_kl if b else forward_kl
        return limit(student_logits, teacher_logits, temperature=temperature, dtype=dtype)
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature, dtype)
    log_m = (b * log_p.exp() + (1 - b) * log_q.exp()).log()
    kl_p = (log_p.exp() * (log_p - log_m)).sum(-1)
    kl_q = (log_q.exp() * (log_q - log_m)).sum(-1)
    return (b * kl_p + (1 - b) * kl_q) / (b * (1 - b))


def skew_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    skew: float = 0.1,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """KL(p || skew p + (1 - skew) q). Ko et al. 2024, arXiv 2402.03898."""
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature, dtype)
    log_m = (skew * log_p.exp() + (1 - skew) * log_q.exp()).log()
    return (log_p.exp() * (log_p - log_m)).sum(-1)


def skew_reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    skew: float = 0.1,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """KL(q || (1 - skew) p + skew q). Ko et al. 2024, arXiv 2402.03898."""
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature, dtype)
    log_m = ((1 - skew) * log_p.exp() + skew * log_q.exp()).log()
    return (log_q.exp() * (log_q - log_m)).sum(-1)


def tvd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Total variation distance, half the sum of |p - q|; the subgradient at p = q is 0."""
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature, dtype)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def alpha_beta(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    ab_alpha: float = 0.5,
    ab_beta: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """-1/(a b) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], a + b not 0; its limit where a or b is 0.

    Wang et al. 2025, arXiv 2505.04560. (a, b) -> (1, 0) gives forward_kl, -> (0, 1) reverse_kl.
    """
    a, b = ab_alpha, ab_beta
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature, dtype)
    if b == 0:
        return (a * (a * log_p).exp() * (log_p - log_q) - (a * log_p).exp() + (a * log_q).exp()).sum(-1) / a**2
    if a == 0:
        return (b * (b * log_q).exp() * (log_q - log_p) - (b * log_q).exp() + (b * log_p).exp()).sum(-1) / b**2
    mixed = (a * log_p + b * log_q).exp()
    own = a / (a + b) * ((a + b) * log_p).exp() + b / (a + b) * ((a + b) * log_q).exp()
    return -(mixed - own).sum(-1) / (a * b)


def logit_mse(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Mean over V of the squared difference of logits / temperature, each centred over the vocabulary."""
    x = student_logits.to(dtype) / temperature
    y = teacher_logits.to(dtype) / temperature
    difference = (x - x.mean(-1, keepdim=True)) - (y - y.mean(-1, keepdim=True))
    return difference.square().mean(-1)


def cross_entropy(student_logits: Tensor, labels: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """-log q(label) at temperature 1; [T, V], [T] int64 -> [T]. Every label must be in [0, V)."""
    log_q = torch.log_softmax(student_logits.to(dtype), dim=-1)
    return -log_q.gather(-1, labels[:, None]).squeeze(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "alpha_beta": alpha_beta,
    "logit_mse": logit_mse,
}
"""Name in the configuration -> definition."""


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """p log(p / q), 0 where p = 0."""
    return xlogy(p, p) - xlogy(p, q)


def _jsd_summand(p: Tensor, q: Tensor, teacher_share: float = 0.5) -> Tensor:
    if teacher_share in (0, 1):
        return _kl(q, p) if teacher_share else _kl(p, q)
    m = teacher_share * p + (1 - teacher_share) * q
    return _kl(p, m) / (1 - teacher_share) + _kl(q, m) / teacher_share


SUMMANDS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": _kl,
    "reverse_kl": lambda p, q: _kl(q, p),
    "jsd": _jsd_summand,
    "skew_kl": lambda p, q, skew=0.1: _kl(p, skew * p + (1 - skew) * q),
    "skew_reverse_kl": lambda p, q, skew=0.1: _kl(q, (1 - skew) * p + skew * q),
    "tvd": lambda p, q: (p - q).abs() / 2,
}
"""f-divergence -> phi(p, q) with D = sum phi, from probabilities of which some are 0: its definition on a sparse
record."""


def head_logits(
    hidden: Tensor, head: Tensor | HeadShard, vocab_size: int, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[T, D] -> logits [T, vocab_size] with the head's bias, scale and soft-cap; rows past it are dropped."""
    head = head if isinstance(head, HeadShard) else HeadShard(head)
    logits = hidden.to(dtype) @ head.weight[:vocab_size].to(dtype).T
    if head.bias is not None:
        logits = logits + head.bias[:vocab_size].to(dtype)
    logits = head.logit_scale * logits
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def total_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    divergence: str,
    temperature: float,
    kd_weight: Tensor,
    ce_weight: Tensor,
    dtype: torch.dtype = torch.float64,
    **parameters: Any,
) -> Tensor:
    """sum_t kd_weight[t] temperature^2 D[t] + ce_weight[t] CE[t]; 0-d.

    Labels are read only where ce_weight is not 0. `parameters`: those of the divergence.
    """
    kd = DIVERGENCES[divergence](student_logits, teacher_logits, temperature=temperature, dtype=dtype, **parameters)
    safe = torch.where(ce_weight != 0, labels, torch.zeros_like(labels))
    ce = cross_entropy(student_logits, safe, dtype=dtype)
    kd_term = torch.where(kd_weight != 0, kd_weight.to(dtype) * temperature**2 * kd, 0.0)
    return (kd_term + torch.where(ce_weight != 0, ce_weight.to(dtype) * ce, 0.0)).sum()
