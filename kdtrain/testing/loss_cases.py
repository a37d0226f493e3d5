"""Loss problems for tests and benchmarks: inputs from a seed, their slice for one rank, and what they must come to.

T tokens, D and E the models' widths, V vocabulary. Three ways to the same numbers: `streamed` (the product),
`reference_result` (float64 formulas and autograd on the same inputs) and `naive_result` (the formulas that a reader
would write first, in the inputs' own precision, float32 at least).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtrain.dist.collectives import Group
from kdtrain.dist.vocab import HeadShard, VocabShard
from kdtrain.losses import LossParts, linear_kd_loss, reference

WIDTH_S, WIDTH_T = 16, 24
PADDING = 1e4
"""Contents of head rows past the vocabulary: a loss that lets one take part is wrong by orders of magnitude."""


@dataclass(frozen=True, slots=True)
class LossCase:
    """One problem. chunk: tokens whose two rows of logits fill slab_bytes; dressed: heads with bias, scale, soft-cap."""

    divergence: str
    vocab: int = 101
    tokens: int = 37
    temperature: float = 1.0
    chunk: int = 8
    multiple: int = 1
    dtype: torch.dtype = torch.float64
    dressed: bool = False
    parameters: tuple[tuple[str, float], ...] = ()
    kd: float = 1.0
    ce: float = 1.0

    def slab_bytes(self, shard: VocabShard) -> int:
        """Bytes of both models' working-precision logits of `chunk` tokens on this shard."""
        return self.chunk * 2 * shard.rows * (8 if self.dtype == torch.float64 else 4)


@dataclass(frozen=True, slots=True)
class Problem:
    """Whole inputs: hidden [T, D] and [T, E], heads of V rows, labels (-100 where ce_weight is 0), weights [T]."""

    hidden_s: Tensor
    head_s: HeadShard
    hidden_t: Tensor
    head_t: HeadShard
    labels: Tensor
    kd_weight: Tensor
    ce_weight: Tensor


@dataclass(frozen=True, slots=True)
class Result:
    """A loss and its gradients: loss 0-d, hidden [T, D], weight [rows, D], bias [rows] or None."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def make_problem(case: LossCase, seed: int = 0) -> Problem:
    """Independent models: KL about 1 to 3 nats. Every 5th kd weight and every 3rd ce weight are 0, labels -100 there."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=draw, dtype=torch.float64) * scale).to(case.dtype)

    def head(width: int, logit_scale: float, softcap: float) -> HeadShard:
        weight, bias = normal(case.vocab, width, scale=1.4 * width**-0.5), normal(case.vocab, scale=0.5)
        return HeadShard(weight, bias, logit_scale, softcap) if case.dressed else HeadShard(weight)

    place = torch.arange(case.tokens)
    weights = torch.rand(2, case.tokens, generator=draw) + 0.5
    kd_weight = (weights[0] * case.kd).where(place % 5 != 0, 0.0)
    ce_weight = (weights[1] * case.ce).where(place % 3 != 1, 0.0)
    labels = torch.randint(case.vocab, (case.tokens,), generator=draw).where(ce_weight != 0, -100)
    return Problem(
        hidden_s=normal(case.tokens, WIDTH_S),
        head_s=head(WIDTH_S, 1.3, 4.0),
        hidden_t=normal(case.tokens, WIDTH_T),
        head_t=head(WIDTH_T, 0.8, 6.0),
        labels=labels,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
    )


def identity_problem(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Problem:
    """A problem whose hidden states are logits [T, V] and whose heads are identities, kd weight 1 and ce weight 0.

    The student's hidden gradient is then d loss / d logits, exactly: every product with 0 or 1 is.
    """
    tokens, vocab = student_logits.shape
    eye = HeadShard(torch.eye(vocab, dtype=student_logits.dtype))
    if labels is None:
        labels = torch.full((tokens,), -100)
    return Problem(student_logits, eye, teacher_logits, eye, labels, torch.ones(tokens), torch.zeros(tokens))


def cut_head(head: HeadShard, shard: VocabShard) -> HeadShard:
    """This rank's rows of a whole head, filled up with PADDING."""
    n = shard.valid_rows
    weight = torch.full((shard.rows, head.weight.shape[1]), PADDING, dtype=head.weight.dtype)
    weight[:n] = head.weight[shard.start : shard.start + n]
    bias = None
    if head.bias is not None:
        bias = torch.full((shard.rows,), PADDING, dtype=head.bias.dtype)
        bias[:n] = head.bias[shard.start : shard.start + n]
    return replace(head, weight=weight, bias=bias)


def require_gradients(head: HeadShard) -> HeadShard:
    """The same head with leaf copies of its tensors that require a gradient."""
    bias = None if head.bias is None else head.bias.detach().clone().requires_grad_()
    return replace(head, weight=head.weight.detach().clone().requires_grad_(), bias=bias)


def streamed(
    case: LossCase, problem: Problem, shard: VocabShard, group: Group = None, *, measure: bool = False
) -> tuple[LossParts, Result]:
    """Loss and gradients by `linear_kd_loss` on this rank's slice. Communicates as that does."""
    hidden = problem.hidden_s.detach().clone().requires_grad_()
    head = require_gradients(cut_head(problem.head_s, shard))
    parts = linear_kd_loss(
        hidden,
        head,
        problem.hidden_t,
        cut_head(problem.head_t, shard),
        problem.labels,
        divergence=case.divergence,
        temperature=case.temperature,
        kd_weight=problem.kd_weight,
        ce_weight=problem.ce_weight,
        shard=shard,
        group=group,
        slab_bytes=case.slab_bytes(shard),
        measure=measure,
        **dict(case.parameters),  # type: ignore[arg-type]
    )
    parts.loss.backward()
    return parts, _result(parts.loss, hidden, head)


def reference_result(case: LossCase, problem: Problem) -> Result:
    """The float64 reference on the very inputs the fast path gets, gradients by autograd."""
    hidden = problem.hidden_s.detach().double().requires_grad_()
    whole = problem.head_s
    head = require_gradients(
        replace(whole, weight=whole.weight.double(), bias=None if whole.bias is None else whole.bias.double())
    )
    student, teacher = reference_logits(replace(problem, hidden_s=hidden, head_s=head))
    loss = reference.total_loss(
        student,
        teacher,
        problem.labels,
        divergence=case.divergence,
        temperature=case.temperature,
        kd_weight=problem.kd_weight,
        ce_weight=problem.ce_weight,
        **dict(case.parameters),
    )
    loss.backward()
    return _result(loss, hidden, head)


def reference_logits(problem: Problem) -> tuple[Tensor, Tensor]:
    """Both models' whole float64 logits [T, V]."""
    vocab = problem.head_s.weight.shape[0]
    return (
        reference.head_logits(problem.hidden_s, problem.head_s, vocab),
        reference.head_logits(problem.hidden_t, problem.head_t, vocab),
    )


def naive_result(case: LossCase, problem: Problem) -> Result:
    """Materialised [T, V] logits and autograd in the inputs' dtype, half precision upcast to float32 first."""
    work = torch.float64 if case.dtype == torch.float64 else torch.float32
    hidden = problem.hidden_s.detach().clone().requires_grad_()
    head = require_gradients(problem.head_s)
    student = _naive_logits(hidden, head, work)
    teacher = _naive_logits(problem.hidden_t, problem.head_t, work)
    loss = naive_loss(case, student, teacher, problem)
    loss.backward()
    return _result(loss, hidden, head)


def naive_loss(case: LossCase, student: Tensor, teacher: Tensor, problem: Problem) -> Tensor:
    """The total loss from materialised logits [T, V], in their dtype."""
    tau = case.temperature
    log_q, log_p = F.log_softmax(student / tau, -1), F.log_softmax(teacher / tau, -1)
    kd = NAIVE[case.divergence](log_q, log_p, student / tau - teacher / tau, dict(case.parameters)).sum(-1)
    counted = problem.ce_weight != 0
    ce = F.cross_entropy(student, problem.labels.where(counted, 0), reduction="none")
    return (problem.kd_weight * tau**2 * kd).sum() + (problem.ce_weight * ce).sum()


def _naive_logits(hidden: Tensor, head: HeadShard, work: torch.dtype) -> Tensor:
    logits = hidden.to(work) @ head.weight.to(work).T
    if head.bias is not None:
        logits = logits + head.bias.to(work)
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


Formula = Callable[[Tensor, Tensor, Tensor, dict[str, float]], Tensor]


def _naive_jsd(log_q: Tensor, log_p: Tensor, gap: Tensor, parameters: dict[str, float]) -> Tensor:
    b = parameters.get("teacher_share", 0.5)
    log_m = (b * log_p.exp() + (1 - b) * log_q.exp()).log()
    return (b * log_p.exp() * (log_p - log_m) + (1 - b) * log_q.exp() * (log_q - log_m)) / (b * (1 - b))


def _naive_alpha_beta(log_q: Tensor, log_p: Tensor, gap: Tensor, parameters: dict[str, float]) -> Tensor:
    a, b = parameters.get("ab_alpha", 0.5), parameters.get("ab_beta", 0.5)
    p, q = log_p.exp(), log_q.exp()
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b)


def _naive_skew(log_q: Tensor, log_p: Tensor, gap: Tensor, parameters: dict[str, float]) -> Tensor:
    share = parameters.get("skew", 0.1)
    return log_p.exp() * (log_p - (share * log_p.exp() + (1 - share) * log_q.exp()).log())


NAIVE: dict[str, Formula] = {
    "forward_kl": lambda log_q, log_p, gap, parameters: F.kl_div(log_q, log_p, reduction="none", log_target=True),
    "reverse_kl": lambda log_q, log_p, gap, parameters: F.kl_div(log_p, log_q, reduction="none", log_target=True),
    "jsd": _naive_jsd,
    "skew_kl": _naive_skew,
    "skew_reverse_kl": lambda log_q, log_p, gap, parameters: _naive_skew(log_p, log_q, gap, parameters),
    "tvd": lambda log_q, log_p, gap, parameters: (log_p.exp() - log_q.exp()).abs() / 2,
    "alpha_beta": _naive_alpha_beta,
    "logit_mse": lambda log_q, log_p, gap, parameters: (gap - gap.mean(-1, keepdim=True)).square() / gap.shape[-1],
}
"""Name -> (log q, log p, logit difference, parameters) -> terms [T, V] whose sum over V is the divergence."""


def relative_error(got: Tensor, want: Tensor) -> float:
    """norm(got - want) / norm(want), in float64; the plain norm of the error where want is 0."""
    want = want.double()
    size = float(want.norm())
    return float((got.double() - want).norm()) / (size or 1.0)


def _result(loss: Tensor, hidden: Tensor, head: HeadShard) -> Result:
    assert hidden.grad is not None and head.weight.grad is not None
    return Result(loss.detach(), hidden.grad, head.weight.grad, None if head.bias is None else head.bias.grad)
