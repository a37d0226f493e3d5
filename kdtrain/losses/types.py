"""Argument and result types of losses. T tokens, K kept ids, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossParts:
    """A loss summed over tokens, and values measured per token; replicated over the tp group.

    loss           0-d fp32 (fp64 for fp64 inputs), differentiable:
                   sum_t kd_weight[t] * temperature^2 * D[t] + ce_weight[t] * CE[t]
    kd             [T] detached, D in nats at the loss temperature, without weights and temperature^2; None if no KD
    ce             [T] detached, -log q(label) at temperature 1
    lse            [T] detached, log sum exp of the student's logits at temperature 1
    teacher_ce     [T] detached, -log p(label) at temperature 1; None without a dense teacher
    student_entropy, teacher_entropy   [T] detached, nats, at the loss temperature; None unless measured
    forward_kl     [T] detached, KL(teacher||student) at temperature 1, for every divergence; None unless measured
    tvd            [T] detached, total variation distance at the loss temperature; None unless measured
    agreement      [T] detached float, 1 where the arg-max of both models is the same id; None unless measured
    """

    loss: Tensor
    ce: Tensor
    lse: Tensor
    kd: Tensor | None = None
    teacher_ce: Tensor | None = None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    forward_kl: Tensor | None = None
    tvd: Tensor | None = None
    agreement: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TopK:
    """The K largest teacher logits per token, descending, ties to the smaller id.

    ids [T, K] int32 global; logits [T, K], as the head gives them; lse [T, len(temperatures)], log sum exp of all
    logits / temperature; log_tail [T, len(temperatures)], log of the probability outside the K ids. Numbers are fp32
    (fp64 for fp64 inputs).
    """

    ids: Tensor
    logits: Tensor
    lse: Tensor
    log_tail: Tensor


@dataclass(frozen=True, slots=True)
class SparseTarget:
    """A sparse teacher distribution per token, at the temperature of the loss it is used with.

    ids [T, K] int32 global, no id twice in a row (-1 marks an empty slot, whose weight is 0); weights [T, K] fp32, with
    the tail they sum to 1; log_tail [T] fp32, log of the probability outside the ids, or None; label_log_prob [T] and
    entropy [T] fp32, nats: of the whole teacher distribution, the entropy at the temperature of the weights.
    unbiased: the weights are an unbiased estimate of the teacher's distribution (sampled ids, no tail), so losses that
    are linear in the weights are unbiased too.
    """

    ids: Tensor
    weights: Tensor
    log_tail: Tensor | None
    label_log_prob: Tensor
    entropy: Tensor
    unbiased: bool = False
