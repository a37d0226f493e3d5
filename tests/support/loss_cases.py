"""Random distillation problems, sharded over ranks or whole, and their solutions in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from kdtrain_kernels.divergences import DIVERGENCES, divergence_spec
from torch import Tensor

from kdtrain.distributed.collectives import Group, group_rank, group_size
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import LossParts, linear_kd_loss, reference, stream
from kdtrain.losses.vocab_group import VocabGroup

GARBAGE = 1e3
"""Value of a head's padding rows in a case; it must not affect results."""


VARIANTS: list[tuple[str, dict[str, float]]] = [(name, {}) for name in reference.DIVERGENCES] + [
    ("jsd", {"teacher_share": 0.9}),
    ("jsd", {"teacher_share": 0.0}),
    ("jsd", {"teacher_share": 1.0}),
    ("skew_kl", {"skew": 0.0}),
    ("skew_kl", {"skew": 0.7}),
    ("skew_reverse_kl", {"skew": 0.7}),
    ("alpha_beta", {"ab_alpha": 1.0, "ab_beta": 0.0}),
    ("alpha_beta", {"ab_alpha": 0.0, "ab_beta": 0.8}),
    ("alpha_beta", {"ab_alpha": 0.7, "ab_beta": 0.0}),
    ("alpha_beta", {"ab_alpha": -0.3, "ab_beta": 1.2}),
]
"""Divergences with parameters: all of them with their defaults, and more values of those that have parameters."""
VARIANT_IDS = [name + "".join(f"-{k}={v}" for k, v in parameters.items()) for name, parameters in VARIANTS]


@dataclass(frozen=True, slots=True)
class LossCase:
    """Both models' hidden states and whole heads (no padding rows), labels, weights and settings of the loss.

    parameters: temperature and the divergence's own, where they are not the defaults.
    """

    hidden_s: Tensor
    head_s: HeadShard
    hidden_t: Tensor
    head_t: HeadShard
    labels: Tensor
    kd_weight: Tensor
    ce_weight: Tensor
    divergence: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Rows of the heads."""
        return self.head_s.weight.shape[0]


@dataclass(frozen=True, slots=True)
class Answer:
    """Loss, gradients and per-token values of a case; the head's gradients for the requested rows."""

    loss: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor | None
    parts: LossParts | None = None


def random_case(
    num_tokens: int,
    vocab_size: int,
    *,
    divergence: str = "forward_kl",
    widths: tuple[int, int] = (16, 24),
    properties: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **parameters: Any,
) -> LossCase:
    """A case whose divergence is of the order of a nat. A third of the tokens has kd_weight 0, another third
    ce_weight 0 and an impossible label. properties: both heads have a bias, a scale and a soft-cap."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def head(width: int) -> HeadShard:
        weight = (normal(vocab_size, width) * 1.5 / width**0.5).to(dtype)
        return HeadShard(weight, normal(vocab_size).to(dtype), 0.8, 9.0) if properties else HeadShard(weight)

    labels = torch.randint(0, vocab_size, (num_tokens,), generator=rng)
    kd_weight = torch.rand(num_tokens, generator=rng) + 0.5
    ce_weight = torch.rand(num_tokens, generator=rng) + 0.5
    kd_weight[::3] = 0.0
    ce_weight[1::3] = 0.0
    labels[1::3] = -100
    student, teacher = normal(num_tokens, widths[0]).to(dtype), normal(num_tokens, widths[1]).to(dtype)
    return LossCase(
        student, head(widths[0]), teacher, head(widths[1]), labels, kd_weight, ce_weight, divergence, parameters
    )


def naive_answer(case: LossCase, dtype: torch.dtype = torch.float64) -> Answer:
    """The case by materialised logits and autograd in `dtype`, from the same inputs."""
    hidden, head = student_leaves(case, dtype)
    student = reference.head_logits(hidden, head, case.vocab_size, dtype=dtype)
    teacher = reference.head_logits(case.hidden_t, case.head_t, case.vocab_size, dtype=dtype)
    loss = reference.total_loss(
        student,
        teacher,
        case.labels,
        divergence=case.divergence,
        kd_weight=case.kd_weight,
        ce_weight=case.ce_weight,
        dtype=dtype,
        **{"temperature": 1.0, **case.parameters},
    )
    return answer_of(loss, hidden, head)


def student_leaves(case: LossCase, dtype: torch.dtype) -> tuple[Tensor, HeadShard]:
    """Copies in `dtype` of the student's hidden states and whole head, as leaves that require gradients."""
    hidden, head = case.hidden_s.clone().to(dtype).requires_grad_(), case.head_s
    bias = None if head.bias is None else head.bias.clone().to(dtype).requires_grad_()
    return hidden, replace(head, weight=head.weight.clone().to(dtype).requires_grad_(), bias=bias)


def answer_of(
    loss: Tensor, hidden: Tensor, head: HeadShard, shard: VocabShard | None = None, parts: LossParts | None = None
) -> Answer:
    """`loss` and its gradients, in the head those of `shard`'s real tokens. Checks that padding rows received 0."""
    torch.autograd.backward(loss)
    rows = head.weight.shape[0] if shard is None else shard.valid_rows
    grads = [None if x is None else x.grad for x in (head.weight, head.bias)]
    for grad in grads:
        assert grad is None or not grad[rows:].any(), "a padding row received a gradient"
    weight, bias = (None if grad is None else grad[:rows] for grad in grads)
    assert hidden.grad is not None
    assert weight is not None
    return Answer(loss.detach(), hidden.grad, weight, bias, parts)


def cut_head(head: HeadShard, shard: VocabShard) -> HeadShard:
    """`shard`'s rows of a whole head, as leaves that require gradients, padded with GARBAGE."""

    def cut(whole: Tensor | None) -> Tensor | None:
        if whole is None:
            return None
        rows = torch.full((shard.rows, *whole.shape[1:]), GARBAGE, dtype=whole.dtype)
        rows[: shard.valid_rows] = whole[shard.start : shard.start + shard.valid_rows]
        return rows.requires_grad_()

    weight = cut(head.weight)
    assert weight is not None
    return replace(head, weight=weight, bias=cut(head.bias))


def divergence_arguments(case: LossCase) -> dict[str, Any]:
    """The case's divergence and parameters as arguments of the public losses: keywords, or a spec for parameters that
    are no keywords of theirs."""
    keywords, known = linear_kd_loss.__kwdefaults__ or {}, DIVERGENCES[case.divergence].parameters
    if all(name in keywords for name in case.parameters):
        return {"divergence": case.divergence, **case.parameters}
    others = {name: value for name, value in case.parameters.items() if name not in ("temperature", *known)}
    own = {name: value for name, value in case.parameters.items() if name not in others}
    return {"divergence": divergence_spec(case.divergence, **own), **others}


def loss_of(case: LossCase, **changes: Any) -> LossParts:
    """`linear_kd_loss` on a whole case, with some arguments replaced or added. Communicates what the loss does."""
    arguments: dict[str, Any] = {
        "hidden_s": case.hidden_s,
        "head_s": case.head_s,
        "hidden_t": case.hidden_t,
        "head_t": case.head_t,
        "labels": case.labels,
        "kd_weight": case.kd_weight,
        "ce_weight": case.ce_weight,
        "shard": VocabShard.of(case.vocab_size, multiple=1),
        **divergence_arguments(case),
        **changes,
    }
    return linear_kd_loss(**arguments)


def streamed_answer(
    case: LossCase, *, group: Group = None, multiple: int = 1, chunk: int = 8, measure: bool = False
) -> tuple[Answer, VocabShard]:
    """The case by `linear_kd_loss` in chunks of about `chunk` tokens; this rank's rows of the head's gradients.

    Communicates what the loss does. Checks that padding rows of the head received exactly 0.
    """
    shard = VocabShard.of(case.vocab_size, group_rank(group), group_size(group), multiple=multiple)
    head = cut_head(case.head_s, shard)
    hidden = case.hidden_s.clone().requires_grad_()
    parts = loss_of(
        case,
        hidden_s=hidden,
        head_s=head,
        head_t=cut_head(case.head_t, shard),
        shard=shard,
        group=group,
        slab_bytes=stream.bytes_per_token(VocabGroup(shard, group), case.hidden_s.dtype) * chunk,
        measure=measure,
    )
    return answer_of(parts.loss, hidden, head, shard, parts), shard


def identity_case(student: Tensor, teacher: Tensor, case: LossCase) -> LossCase:
    """`case` with these [T, V] logits as hidden states of identity heads: d(hidden) is then d(logits)."""
    eye = torch.eye(student.shape[1], dtype=student.dtype)
    return replace(case, hidden_s=student, head_s=HeadShard(eye), hidden_t=teacher, head_t=HeadShard(eye))


def reference_fields(case: LossCase) -> dict[str, Tensor]:
    """Every per-token field of LossParts [T] in float64, straight from its definition; 0 where there is no label."""
    temperature = case.parameters.get("temperature", 1.0)
    s = reference.head_logits(case.hidden_s, case.head_s, case.vocab_size)
    t = reference.head_logits(case.hidden_t, case.head_t, case.vocab_size)
    log_q, log_p = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    has_label, real = case.labels >= 0, case.labels.clamp(min=0)
    return {
        "ce": reference.cross_entropy(s, real).where(has_label, 0.0),
        "teacher_ce": reference.cross_entropy(t, real).where(has_label, 0.0),
        "kd": reference.DIVERGENCES[case.divergence](s, t, **case.parameters),
        "student_entropy": -(log_q.exp() * log_q).sum(-1),
        "teacher_entropy": -(log_p.exp() * log_p).sum(-1),
        "forward_kl": reference.forward_kl(s, t),
        "tvd": reference.tvd(s, t, temperature=temperature),
        "agreement": (s.argmax(-1) == t.argmax(-1)).double(),
    }


def relative_error(got: Tensor, expected: Tensor) -> float:
    """norm(got - expected) / norm(expected), in float64."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
