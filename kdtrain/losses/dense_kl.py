"""Distillation from a full teacher distribution: loss and gradients from the hidden states of both models.

Streamed over token chunks and vocabulary shards; neither model's [T, V] logits ever exist. One all-gather of ten
numbers per token and rank merges the statistics, a second one of one number follows for the divergences that need it.
Derivation: docs/design/0004-streamed-loss.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from kdtrain_kernels.dispatch import pair_kernels
from kdtrain_kernels.divergences import DivergenceSpec
from kdtrain_kernels.matmul import work_dtype
from kdtrain_kernels.protocol import RowKernels
from kdtrain_kernels.torch_rows import PairTotals
from torch import Tensor

from kdtrain.distributed.collectives import Group, gather_ranks, start_gather
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import checks, stream
from kdtrain.losses.arguments import spec_of
from kdtrain.losses.runner import Call, Run, streamed
from kdtrain.losses.types import LossParts
from kdtrain.losses.vocab_group import VocabGroup


def linear_kd_loss(  # noqa: PLR0913
    hidden_s: Tensor,
    head_s: Tensor | HeadShard,
    hidden_t: Tensor,
    head_t: Tensor | HeadShard,
    labels: Tensor,
    *,
    divergence: str | DivergenceSpec,
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
    z_weight: Tensor | None = None,
    main_grad: Tensor | None = None,
    backend: str = "auto",
) -> LossParts:
    """sum_t kd_weight[t] temperature^2 D[t] + ce_weight[t] CE[t], with D the divergence of `losses.reference`.

    hidden_s [T, D] and hidden_t [T, E], replicated over `group`; head_s [v, D] and head_t [v, E] (or HeadShards), this
    rank's rows of both heads, sharded alike; labels [T] global ids, any value where ce_weight is 0; weights [T],
    constants. The teacher's arguments never receive a gradient. divergence: a name, for which temperature and the
    parameters of that divergence are read, or a `divergence_spec`, which has them (they must be left out then: a value
    other than the default is refused, the default is not read).
    With `measure`, LossParts also has entropies, KL at temperature 1, total variation and top-1 agreement per token
    (one more reading of both logits). z_weight and main_grad as in `linear_cross_entropy`. Everything returned is
    replicated over the group; values in nats. group: the ranks that hold the other rows of the vocabulary, None for
    one rank. slab_bytes: memory for both models' logits of a chunk of C tokens. backend: "auto", "torch" or "triton"
    row kernels. Derivation: docs/design/0004-streamed-loss.md; papers: the functions of `losses.reference`.

    Where kd_weight is 0 everywhere, loss and gradients are bitwise those of `linear_cross_entropy`.
    Memory beyond inputs and gradients: slab_bytes and a few cache blocks. Gradients accumulate in float32 (float64) and
    are kept so until backward, which scales and rounds them into new tensors (on a CPU the first backward with a factor
    of 1 hands them over instead): d(hidden_s) complete on every rank, d(head_s) of this rank's rows, 0 in padding rows.
    Under no_grad no gradient is computed. Communicates over `group`: per chunk one all-gather of [C, 10] (and one of
    [C, 1] for all but forward_kl and reverse_kl; one of [C, 4] to measure); per call one all-gather of [T, 1] ([T, 5]
    to measure) and, if hidden_s needs a gradient, one all-reduce of [T, D]; nothing in backward. Raises ValueError for
    inconsistent arguments before anything is computed.
    """
    head_s, head_t, vocab = stream.as_head(head_s), stream.as_head(head_t), VocabGroup(shard, group)
    checks.check_model("_s", hidden_s, head_s, shard)
    checks.check_model("_t", hidden_t, head_t, shard)
    checks.check_teacher(hidden_s, hidden_t)
    parameters = {"teacher_share": teacher_share, "skew": skew, "ab_alpha": ab_alpha, "ab_beta": ab_beta}
    spec, work = spec_of(divergence, temperature, parameters), work_dtype(hidden_s, hidden_t)
    kernels = pair_kernels(backend, hidden_s.device, work, spec)
    weights = {"kd_weight": kd_weight, "ce_weight": ce_weight, "z_weight": z_weight}
    call = Call.checked(hidden_s, head_s, labels, weights, vocab, slab_bytes, main_grad, work)
    loss, table = streamed(call, _DenseKd(hidden_t.detach(), head_t, spec, measure, kernels))
    names = _FIELDS if measure else _ALWAYS
    return LossParts(loss=loss, **{name: table[_FIELDS.index(name)] for name in names})


_FIELDS = ("lse", "ce", "teacher_ce", "agreement", "kd", "student_entropy", "teacher_entropy", "forward_kl", "tvd")
"""Rows of the table of values: fields of LossParts. From "kd" on they are sums over columns; each rank holds a partial
sum until the end of the call."""
_LSE, _CE, _TEACHER_CE, _AGREEMENT, _KD, _STUDENT_ENTROPY, _TEACHER_ENTROPY, _FORWARD_KL, _TVD = range(9)
_ALWAYS = ("lse", "ce", "teacher_ce", "kd")


@dataclass(frozen=True, slots=True)
class _DenseKd:
    hidden_t: Tensor
    head_t: HeadShard
    spec: DivergenceSpec
    measure: bool
    kernels: RowKernels

    def begin(self, run: Run) -> _Steps:
        """The teacher's slabs, and the table with one row more: Z."""
        call = run.call
        teacher = stream.ModelSide.of(self.hidden_t, self.head_t, call.vocab.shard, run.rows, run.depth, call.work)
        return _Steps(run, self, teacher, run.table(len(_FIELDS) + 1))


Slabs = tuple[Tensor, Tensor]
"""A chunk's student and teacher logits."""
PendingChunk = tuple[Slabs, Callable[[], Tensor]]
"""A chunk's logits, and a function that waits for the statistics of all ranks."""


@dataclass(frozen=True, slots=True)
class _Steps:
    run: Run
    loss: _DenseKd
    teacher: stream.ModelSide
    table: Tensor

    @property
    def _group(self) -> Group:
        return self.run.call.vocab.group

    def issue(self, chunk: slice, slot: int) -> PendingChunk:
        run, kernels, spec = self.run, self.loss.kernels, self.loss.spec
        slabs = run.student.logits(chunk, slot), self.teacher.logits(chunk, slot)
        stats = kernels.pair_stats(*slabs, run.call.weights.columns[chunk], spec=spec, scratch=run.scratch)
        # The softmax needs the maxima and sums of all ranks' rows.
        return slabs, start_gather(stats, self._group)

    def complete(self, chunk: slice, pending: PendingChunk) -> Tensor | None:
        slabs, gathered = pending
        run, call, kernels, spec = self.run, self.run.call, self.loss.kernels, self.loss.spec
        totals = kernels.merge_pair_stats(gathered(), spec, call.vocab.shard.vocab_size)
        totals = self._values(slabs, totals, self.table[:, chunk])
        if not call.needs_grad.any:
            return None
        value, operand = kernels.pair_grad(
            *slabs,
            totals,
            call.weights.of_chunk(chunk, self.table[_LSE, chunk]),
            spec=spec,
            logit_map=run.student.logit_map,
            scratch=run.scratch,
            operand_dtype=run.student.operand_dtype,
        )
        self.table[_KD, chunk] += value
        return operand

    def _values(self, slabs: Slabs, totals: PairTotals, table: Tensor) -> PairTotals:
        """Fill a chunk's columns of the table with the values that need no gradient; returns the totals including Z."""
        run, kernels, spec = self.run, self.loss.kernels, self.loss.spec
        table[_CE], table[_LSE] = totals.student.label_nll(), totals.student.lse()
        table[_TEACHER_CE] = totals.teacher.label_nll()
        if self.loss.measure:
            self._measure(slabs, totals, table)
        if spec.row.two_rounds:
            parts = kernels.pair_round2(*slabs, totals, spec=spec, scratch=run.scratch)
            # Each rank has the part of Z of its own rows. A gather and a sum in rank order: equal bits on all ranks.
            totals = replace(totals, z=gather_ranks(parts[:, 0], self._group).sum(0))
            table[_KD] = parts[:, 1]
        elif not run.call.needs_grad.any:
            table[_KD] = kernels.pair_value(*slabs, totals, spec=spec, scratch=run.scratch)
        table[-1] = totals.z
        return totals

    def _measure(self, slabs: Slabs, totals: PairTotals, table: Tensor) -> None:
        """Fill the measured values that do not enter the loss.

        Entropies are log sum exp(x) - sum q x; one rank adds the first term.
        """
        temperature = self.loss.spec.temperature
        parts = self.loss.kernels.pair_measure(*slabs, totals, temperature, scratch=self.run.scratch)
        first = 0 if self.run.call.vocab.shard.start else 1  # exactly one rank of a group owns id 0
        table[_STUDENT_ENTROPY] = first * totals.student.log_sum - parts[:, 0]
        table[_TEACHER_ENTROPY] = first * totals.teacher.log_sum - parts[:, 1]
        table[_FORWARD_KL] = parts[:, 2]
        table[_TVD] = parts[:, 3]
        table[_AGREEMENT] = self._agreement(slabs)

    def _agreement(self, slabs: Slabs) -> Tensor:
        """[C] 1 where both models' largest logit has the same id, ties to the smaller id. One all-gather [C, 4]."""
        found = torch.cat([self.loss.kernels.first_argmax(slab, self.run.scratch) for slab in slabs], 1)
        found[:, 1::2] += self.run.call.vocab.shard.start
        # The largest logit may be on any rank.
        gathered = gather_ranks(found, self._group)
        peaks, ids = gathered[:, :, 0::2], gathered[:, :, 1::2]
        winners = ids.where(peaks == peaks.amax(0), float("inf")).amin(0)
        return (winners[:, 0] == winners[:, 1]).double()

    def finish(self) -> tuple[Tensor, Tensor]:
        """Sum the ranks' partial sums in rank order, once per call, then compute the values that depend on the sums."""
        table, call, spec = self.table, self.run.call, self.loss.spec
        last = _TVD if self.loss.measure else _KD
        # Each rank has the terms of its own rows only.
        table[_KD : last + 1] = gather_ranks(table[_KD : last + 1], self._group).sum(0)
        table[_KD] = spec.from_sums(table[_KD], table[-1])
        table[_FORWARD_KL].clamp_(min=0.0)
        table[_CE:_AGREEMENT] *= stream.is_token(call.labels, call.vocab.shard)
        loss = call.weights.loss(table[_LSE], table[_CE], spec.temperature**2 * table[_KD])
        return loss, table[:-1]
