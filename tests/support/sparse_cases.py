"""Random sparse records of the teachers of `loss_cases`, and the losses on them in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kdtrain.distributed.collectives import Group, group_rank, group_size
from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import SparseTarget, linear_sparse_kd_loss, merge_duplicates, reference, sparse_reference, stream
from kdtrain.losses.vocab_group import VocabGroup
from tests.support.loss_cases import (
    Answer,
    LossCase,
    answer_of,
    cut_head,
    divergence_arguments,
    random_case,
    student_leaves,
)

SCHEMES = ("top_k_tail", "top_k", "truncated", "sampled", "conditional")
"""How a record is made: exact probabilities and the tail; renormalised without it; as they are without it; multinomial
draws; as the first, used with the student renormalised too."""


@dataclass(frozen=True, slots=True)
class SparseCase:
    """A LossCase, a record of its teacher (`target`) and settings of the loss besides its parameters."""

    base: LossCase
    target: SparseTarget
    settings: dict[str, Any] = field(default_factory=dict)


def record_of(logits: Tensor, scheme: str, width: int, *, temperature: float = 1.0, seed: int = 0) -> SparseTarget:
    """A record of teacher logits [T, V] with `width` slots in no order; some are empty, and so is all of token 4."""
    rng = torch.Generator().manual_seed(seed)
    p = (logits.double() / temperature).softmax(-1)
    entropy = -torch.special.xlogy(p, p).sum(1)
    if scheme == "sampled":
        draws = torch.multinomial(p, width, replacement=True, generator=rng)
        ids, weights = merge_duplicates(draws, torch.full(draws.shape, 1 / width))
        ids[4:5], weights[4:5] = -1, 0.0
        return SparseTarget(ids.int(), weights, None, p[:, 0].log().float(), entropy.float(), unbiased=True)
    shuffle = torch.rand(len(p), width, generator=rng).argsort(1)
    ids = p.topk(width).indices.gather(1, shuffle)
    kept = torch.rand(ids.shape, generator=rng) > 0.2
    kept[4:5] = False
    weights = p.gather(1, ids).where(kept, 0.0)
    outside = p.scatter(1, ids, p.gather(1, ids).where(~kept, 0.0)).sum(1)
    if scheme == "top_k":
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-300)
    log_tail = outside.log().float() if scheme in ("top_k_tail", "conditional") else None
    return SparseTarget(ids.where(kept, -1).int(), weights.float(), log_tail, p[:, 0].log().float(), entropy.float())


def sparse_case(
    num_tokens: int, vocab_size: int, scheme: str, *, width: int = 12, seed: int = 0, **of_case: Any
) -> SparseCase:
    """`random_case` with a record of its teacher; half of the labels that count are ids of it.

    of_case: what `random_case` takes.
    """
    base = random_case(num_tokens, vocab_size, seed=seed, **of_case)
    logits = reference.head_logits(base.hidden_t, base.head_t, vocab_size)
    target = record_of(logits, scheme, width, temperature=base.parameters.get("temperature", 1.0), seed=seed)
    inside = (torch.arange(num_tokens) % 2 == 0) & (base.ce_weight != 0) & (target.ids[:, 0] >= 0)
    base = replace(base, labels=target.ids[:, 0].long().where(inside, base.labels))
    settings = {"allow_biased": True} | ({"renormalise_student": True} if scheme == "conditional" else {})
    return SparseCase(base, target, settings)


def naive_sparse_answer(case: SparseCase, dtype: torch.dtype = torch.float64) -> Answer:
    """The case by materialised logits and autograd in `dtype`, from the same inputs."""
    base = case.base
    hidden, head = student_leaves(base, dtype)
    loss = sparse_reference.sparse_total_loss(
        reference.head_logits(hidden, head, base.vocab_size, dtype=dtype),
        case.target,
        base.labels,
        divergence=base.divergence,
        kd_weight=base.kd_weight,
        ce_weight=base.ce_weight,
        renormalise_student=case.settings.get("renormalise_student", False),
        dtype=dtype,
        **{"temperature": 1.0, **base.parameters},
    )
    return answer_of(loss, hidden, head)


def streamed_sparse_answer(
    case: SparseCase, *, group: Group = None, multiple: int = 1, chunk: int = 8, **extra: Any
) -> tuple[Answer, VocabShard]:
    """The case by `linear_sparse_kd_loss` in chunks of about `chunk` tokens; this rank's rows of the head's gradients.

    Communicates what the loss does. Checks that padding rows of the head received exactly 0.
    """
    base = case.base
    shard = VocabShard.of(base.vocab_size, group_rank(group), group_size(group), multiple=multiple)
    head = cut_head(base.head_s, shard)
    hidden = base.hidden_s.clone().requires_grad_()
    parts = linear_sparse_kd_loss(
        hidden,
        head,
        case.target,
        base.labels,
        kd_weight=base.kd_weight,
        ce_weight=base.ce_weight,
        shard=shard,
        group=group,
        slab_bytes=stream.bytes_per_token(VocabGroup(shard, group), hidden.dtype) * chunk,
        **{**divergence_arguments(base), **case.settings, **extra},
    )
    return answer_of(parts.loss, hidden, head, shard, parts), shard
