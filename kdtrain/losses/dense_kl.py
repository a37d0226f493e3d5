"""Distillation from a full teacher distribution: both models' hidden states in, loss and gradients out.

Streamed over token chunks and vocabulary shards; neither model's [T, V] logits ever exist. One all-gather of nine
numbers per token and rank merges the statistics, a second one of one number follows for the divergences that need it.
Derivation: docs/design/0004-streamed-loss.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kdtrain_kernels import torch_rows as kernels
from kdtrain_kernels.divergences import DivergenceSpec
from kdtrain_kernels.matmul import work_dtype
from torch import Tensor

from kdtrain.dist.collectives import Group, gather_ranks, reduce_sum_
from kdtrain.dist.vocab import HeadShard, VocabShard
from kdtrain.losses import stream
from kdtrain.losses.reference import DIVERGENCES
from kdtrain.losses.types import LossParts


def linear_kd_loss(
    hidden_s: Tensor,
    head_s: Tensor | HeadShard,
    hidden_t: Tensor,
    head_t: Tensor | HeadShard,
    labels: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    kd_weight: Tensor,
    ce_weight: Tensor,
    shard: VocabShard,
    group: Group = None,
    slab_bytes: int = stream.DEFAULT_SLAB_BYTES,
    teacher_share: float = 0.5,
    skew: float = 0.1,
    ab_alpha: float = 0.5,
    ab_beta: float = 0.5,
    measure: bool = False,
) -> LossParts:
    """sum_t kd_weight[t] temperature^2 D[t] + ce_weight[t] CE[t], with D the divergence of `losses.reference`.

    hidden_s [T, D] and hidden_t [T, E], replicated over `group`; head_s [v, D] and head_t [v, E] (or HeadShards), this
    rank's rows of both heads, cut alike; labels [T] int64 global ids, any value where ce_weight is 0; weights [T].
    The teacher's arguments never receive a gradient. Only the parameters of the chosen divergence are read. With
    `measure`, LossParts also has entropies, KL at temperature 1, total variation and top-1 agreement per token (one
    more reading of both logits). Everything returned is replicated over the group.

    Where kd_weight is 0 everywhere, loss and gradients are bitwise those of `linear_cross_entropy`.
    Memory beyond inputs and returned gradients: slab_bytes and a few cache blocks. Gradients are computed here, so
    backward only scales them: d(hidden_s) complete on every rank, d(head_s) of this rank's rows, 0 in padding rows.
    Communicates over `group`: per chunk one all-gather of [C, 9] (and one of [C, 1] for jsd, both skews, tvd and
    alpha_beta; one of [C, 4] to measure); per call one all-reduce of [T, <= 5] and, if hidden_s needs a gradient, one
    of [T, D]; nothing in backward. Raises ValueError for arguments that do not fit; nothing is computed then.
    """
    head_s, head_t = stream.as_head(head_s), stream.as_head(head_t)
    _check(hidden_s, head_s, hidden_t, head_t, shard)
    stream.check_tokens("labels", labels, hidden_s, integral=True)
    stream.check_tokens("kd_weight", kd_weight, hidden_s)
    stream.check_tokens("ce_weight", ce_weight, hidden_s)
    stream.check_slab_bytes(slab_bytes)
    spec = _spec(divergence, temperature, (teacher_share, skew, ab_alpha, ab_beta), shard.vocab_size)
    stream.check_labels(labels, ce_weight, shard)
    weights = (kd_weight, ce_weight)
    wanted = stream.wanted_gradients(hidden_s, head_s)
    call = _Call(
        head_s, hidden_t, head_t, labels, weights, spec, float(temperature), shard, group, slab_bytes, measure, wanted
    )
    loss, table = _LinearKd.apply(hidden_s, head_s.weight, head_s.bias, call)
    fields = dict(zip(_TABLE, table, strict=True))
    return LossParts(loss=loss, **(fields if measure else {name: fields[name] for name in _ALWAYS}))


_TABLE = ("ce", "teacher_ce", "agreement", "kd", "student_entropy", "teacher_entropy", "forward_kl", "tvd")
"""Rows of the table that the Function returns: fields of LossParts. From "kd" on they are sums over columns, of which
each rank first holds its part."""
_CE, _TEACHER_CE, _AGREEMENT, _KD = range(4)
_ALWAYS = ("ce", "teacher_ce", "kd")


@dataclass(frozen=True, slots=True)
class _Call:
    head_s: HeadShard
    hidden_t: Tensor
    head_t: HeadShard
    labels: Tensor
    weights: tuple[Tensor, Tensor]
    spec: DivergenceSpec
    temperature: float
    shard: VocabShard
    group: Group
    slab_bytes: int
    measure: bool
    wanted: tuple[bool, bool, bool]


class _LinearKd(torch.autograd.Function):
    """Gradient in forward: backward holds d(hidden) and d(head) only."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        work = work_dtype(hidden, call.hidden_t)
        rows = stream.chunk_rows(call.slab_bytes, call.shard.rows, work.itemsize)
        student = stream.ModelSide.of(hidden, call.head_s, call.shard, rows, work)
        teacher = stream.ModelSide.of(call.hidden_t, call.head_t, call.shard, rows, work)
        grads = stream.GradientBuffers.zeros(hidden, call.head_s, call.wanted, work)
        columns = stream.local_labels(call.labels, call.shard)
        kd_weight, ce_weight = (w.to(work) for w in call.weights)
        table = torch.zeros(len(_TABLE), hidden.shape[0], dtype=work, device=hidden.device)
        for chunk in stream.chunks(hidden.shape[0], rows):
            s, t = student.logits(chunk), teacher.logits(chunk)
            inputs = _chunk_inputs(s, t, call, table[:, chunk], columns[chunk], (kd_weight[chunk], ce_weight[chunk]))
            if grads.wanted:
                ratio = stream.squared_ratio_of(s, call.head_s.softcap)
                table[_KD, chunk] = kernels.pair_grad_(s, t, inputs, call.temperature, call.spec)
                grads.add(student, chunk, s, ratio)
            else:
                table[_KD, chunk] = kernels.pair_divergence(s, t, inputs, call.temperature, call.spec)
        # Sums over this rank's columns wait until here: one reduction per call, not per chunk.
        reduce_sum_(table[_KD:] if call.measure else table[_KD], call.group)
        table[: _AGREEMENT] *= stream.is_token(call.labels, call.shard)
        ce_sum = (ce_weight.double() * table[_CE].double()).sum()
        kd_sum = (kd_weight.double() * (call.temperature**2 * table[_KD].double())).sum()
        stream.save_gradients(ctx, grads, hidden, weight, call.group)
        ctx.mark_non_differentiable(table)
        return (kd_sum + ce_sum).to(work), table

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_table: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*stream.scaled_gradients(ctx, grad_loss), None)


def _chunk_inputs(
    s: Tensor, t: Tensor, call: _Call, table: Tensor, columns: Tensor, weights: tuple[Tensor, Tensor]
) -> kernels.GradInputs:
    """Statistics of a chunk, merged over the group; fills the chunk's columns of the table."""
    temperature, spec = call.temperature, call.spec
    gathered = gather_ranks(kernels.pair_stats(s, t, columns, temperature, spec), call.group)
    of_s = kernels.merge_stats(gathered[:, :, : kernels.ROW_STATS], temperature)
    of_t = kernels.merge_stats(gathered[:, :, kernels.ROW_STATS : 2 * kernels.ROW_STATS], temperature)
    table[_CE] = of_s.lse_1 - of_s.label
    table[_TEACHER_CE] = of_t.lse_1 - of_t.label
    if spec.z_is_known:
        z = kernels.merge_coupling(gathered, of_s, of_t, temperature, spec)
    else:
        part = kernels.pair_round2(s, t, of_s.lse, of_t.lse, temperature, spec)
        z = gather_ranks(part, call.group).sum(0)
    if call.measure:
        table[_KD + 1 :] = kernels.pair_measure(s, t, of_s, of_t, temperature).T
        table[_AGREEMENT] = _agreement(s, t, call)
    compares_logits = spec.name == "logit_mse"
    lse_s, lse_t = (torch.zeros_like(z), torch.zeros_like(z)) if compares_logits else (of_s.lse, of_t.lse)
    return kernels.GradInputs(lse_s, of_s.lse_1, lse_t, z, *weights, columns)


def _agreement(s: Tensor, t: Tensor, call: _Call) -> Tensor:
    """[C] 1 where both models' largest logit belongs to the same id, ties to the smaller id. One all-gather [C, 4]."""
    found = gather_ranks(torch.cat([kernels.first_argmax(s), kernels.first_argmax(t)], 1), call.group)
    winners = []
    for column in (0, 2):
        # ids ascend with rank, so the first rank that holds the maximum holds the smallest id
        peak = found[:, :, column]
        ranks = torch.arange(len(peak), device=peak.device)[:, None]
        first = ranks.where(peak == peak.amax(0), len(peak)).amin(0)
        local = found[:, :, column + 1].gather(0, first[None])[0]
        winners.append(first * call.shard.rows + local.long())
    return (winners[0] == winners[1]).to(s.dtype)


def _check(hidden_s: Tensor, head_s: HeadShard, hidden_t: Tensor, head_t: HeadShard, shard: VocabShard) -> None:
    stream.check_model("s", hidden_s, head_s, shard)
    stream.check_model("t", hidden_t, head_t, shard)
    if hidden_s.shape[0] != hidden_t.shape[0]:
        raise ValueError(f"hidden_s has {hidden_s.shape[0]} tokens, hidden_t has {hidden_t.shape[0]}; need the same")
    if hidden_s.device != hidden_t.device:
        raise ValueError(f"hidden_s is on {hidden_s.device}, hidden_t on {hidden_t.device}; need the same")


def _spec(
    divergence: str, temperature: float, parameters: tuple[float, float, float, float], vocab_size: int
) -> DivergenceSpec:
    """The checked divergence. Raises ValueError naming the argument, its value and what is allowed."""
    share, skew, alpha, beta = parameters
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence = {divergence!r} is unknown; choose one of {', '.join(DIVERGENCES)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature = {temperature} must be a number > 0")
    if divergence == "jsd" and not 0 < share < 1:
        raise ValueError(f"teacher_share = {share} must be in (0, 1); its ends are forward_kl and reverse_kl")
    if divergence in ("skew_kl", "skew_reverse_kl") and not 0 < skew < 1:
        raise ValueError(f"skew = {skew} must be in (0, 1); at 0 use forward_kl or reverse_kl")
    if divergence == "alpha_beta" and (alpha == 0 or beta == 0 or alpha + beta == 0):
        raise ValueError(f"ab_alpha = {alpha}, ab_beta = {beta}: neither they nor their sum may be 0")
    return DivergenceSpec(divergence, share, skew, alpha, beta, vocab_size)
