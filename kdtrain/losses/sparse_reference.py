"""Naive float64 definitions of the losses on sparse records: the specification the streamed one is tested against.

[T, V] student logits and a SparseTarget -> [T], nats per token, from full probabilities; one process, no chunks,
differentiable by autograd. Each side is reduced to K + 1 probabilities (the ids and the rest), on which a divergence is
a sum of phi(p, q); empty slots are set to p = q = 1, where every phi is 0. As in `reference`, temperature^2 is applied
in `sparse_total_loss` only. p: weights at `temperature`; q = softmax(student / temperature).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, xlogy

from kdtrain.losses.reference import SUMMANDS, cross_entropy
from kdtrain.losses.types import SparseTarget


def sparse_kd(
    student_logits: Tensor,
    target: SparseTarget,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    renormalise_student: bool = False,
    dtype: torch.dtype = torch.float64,
    **parameters: float,
) -> Tensor:
    """D [T] of a record: with its tail as one more outcome, without a tail (p = 0 there), or renormalised on the ids.

    Unbiased records: the cross-entropy under the weights minus the teacher's entropy, for forward_kl. Raises KeyError
    for a divergence that has no SUMMANDS.
    """
    q = torch.softmax(student_logits.to(dtype) / temperature, -1)
    here, ids = target.ids >= 0, target.ids.long().clamp(min=0)
    p, q_k = target.weights.to(dtype), q.gather(1, ids).where(here, 0.0)
    known = (p > 0).any(1)
    if divergence == "forward_kl" and target.unbiased and not renormalise_student:
        value = -xlogy(p, q_k.where(here, 1.0)).sum(1) - target.entropy.to(dtype)
        return value.where(known, 0.0)
    if renormalise_student:
        p, q = (side / side.sum(1, keepdim=True).where(known[:, None], 1.0) for side in (p, q_k))
    else:
        outside = torch.ones_like(q).scatter_add_(1, ids, -here.to(dtype))
        tail = torch.zeros_like(p[:, 0]) if target.log_tail is None else target.log_tail.to(dtype).exp()
        p = torch.cat([p, tail[:, None]], 1)
        q = torch.cat([q_k, (q * outside).sum(1, keepdim=True)], 1)
    empty = (p == 0) & (q == 0)
    summands = SUMMANDS[divergence](p.masked_fill(empty, 1.0), q.masked_fill(empty, 1.0), **parameters)
    value = summands.sum(1)
    return value.where(known, 0.0) if target.log_tail is None or renormalise_student else value


def sparse_total_loss(
    student_logits: Tensor,
    target: SparseTarget,
    labels: Tensor,
    *,
    temperature: float,
    kd_weight: Tensor,
    ce_weight: Tensor,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> Tensor:
    """sum_t kd_weight[t] temperature^2 D[t] + ce_weight[t] CE[t]; 0-d. `settings`: what `sparse_kd` takes.

    Labels are read only where ce_weight is not 0, records only where kd_weight is not 0.
    """
    kd = sparse_kd(student_logits, target, temperature=temperature, dtype=dtype, **settings)
    safe = torch.where(ce_weight != 0, labels, torch.zeros_like(labels))
    ce = cross_entropy(student_logits, safe, dtype=dtype)
    kd = (kd_weight.to(dtype) * temperature**2 * kd).where(kd_weight != 0, 0.0)
    return (kd + ce_weight.to(dtype) * ce).sum()
