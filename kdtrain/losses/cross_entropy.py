"""Cross-entropy from hidden states, streamed over token chunks and vocabulary shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kdtrain_kernels.dispatch import row_kernels
from kdtrain_kernels.matmul import work_dtype
from kdtrain_kernels.protocol import RowKernels
from torch import Tensor

from kdtrain.distributed.collectives import Group, start_gather
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import checks, stream
from kdtrain.losses.runner import Call, Run, streamed
from kdtrain.losses.types import LossParts
from kdtrain.losses.vocab_group import VocabGroup


def linear_cross_entropy(  # noqa: PLR0913
    hidden: Tensor,
    head: Tensor | HeadShard,
    labels: Tensor,
    *,
    weight: Tensor,
    shard: VocabShard,
    group: Group = None,
    slab_bytes: int = stream.DEFAULT_SLAB_BYTES,
    z_weight: Tensor | None = None,
    main_grad: Tensor | None = None,
    backend: str = "auto",
) -> LossParts:
    """sum_t weight[t] * -log q(labels[t]), with q = softmax of the head's logits over the whole vocabulary.

    hidden [T, D], replicated over `group`; head [v, D] (or a HeadShard with bias, scale, soft-cap), this rank's rows;
    labels [T], global ids, any value where weight is 0; weight [T], constants. Returns LossParts with `loss` (float32,
    float64 for float64 inputs) and `ce` [T], nats (0 where the label is not a token), both replicated.
    z_weight [T] adds sum_t z_weight[t] lse[t]^2, with lse = log sum exp of the logits (z-loss, PaLM, arXiv 2204.02311).
    main_grad [v, D] in the working dtype receives d(head) on top of what it holds, in forward, and the weight gets no
    .grad: backward must then be called once, with an upstream gradient of 1 (ValueError otherwise). Do not recompute
    this call (activation checkpointing around it) or discard its loss: each forward adds to the buffer. shard, group,
    slab_bytes (of which one model uses half) and backend: as in `linear_kd_loss`.

    Memory beyond inputs and gradients: half of slab_bytes (chunks are those of `linear_kd_loss`, with one model) and a
    few cache blocks. Gradients accumulate in float32 (float64) and are kept so until backward, which scales and rounds
    them into new tensors, or hands them over as `linear_kd_loss` does: d(hidden) complete on every rank, d(head) of
    this rank's rows, 0 in padding rows. Under no_grad no gradient is computed. Communicates over `group`: one
    all-gather of [C, 4] per chunk, hidden behind the next chunk, and, if hidden needs a gradient, one all-reduce of [T,
    D]; nothing in backward. Raises ValueError for inconsistent arguments before anything is computed.
    """
    head, vocab, work = stream.as_head(head), VocabGroup(shard, group), work_dtype(hidden)
    checks.check_model("", hidden, head, shard)
    kernels = row_kernels(backend, hidden.device, work)
    weights = {"weight": weight, "z_weight": z_weight}
    call = Call.checked(hidden, head, labels, weights, vocab, slab_bytes, main_grad, work)
    loss, (ce, lse) = streamed(call, _CrossEntropy(kernels))
    return LossParts(loss=loss, ce=ce, lse=lse)


@dataclass(frozen=True, slots=True)
class _CrossEntropy:
    kernels: RowKernels

    def begin(self, run: Run) -> _Steps:
        """Without a teacher's side."""
        return _Steps(run, self.kernels, run.table(2))


PendingChunk = tuple[Tensor, Callable[[], Tensor]]
"""A chunk's logits, and a function that waits for the statistics of all ranks."""


@dataclass(frozen=True, slots=True)
class _Steps:
    """table: ce and lse per token."""

    run: Run
    kernels: RowKernels
    table: Tensor

    def issue(self, chunk: slice, slot: int) -> PendingChunk:
        run, call = self.run, self.run.call
        logits = run.student.logits(chunk, slot)
        stats = self.kernels.row_stats(logits, call.weights.columns[chunk], 1.0, run.scratch)
        # The softmax needs the maxima and sums of all ranks' rows.
        return logits, start_gather(stats, call.vocab.group)

    def complete(self, chunk: slice, pending: PendingChunk) -> Tensor | None:
        logits, gathered = pending
        run, call = self.run, self.run.call
        totals = self.kernels.merge_stats(gathered(), 1.0)
        ce, lse = self.table[:, chunk]
        ce.copy_(totals.label_nll())
        lse.copy_(totals.lse())
        if not call.needs_grad.any:
            return None
        return self.kernels.row_grad(
            logits,
            totals,
            call.weights.of_chunk(chunk, lse),
            logit_map=run.student.logit_map,
            scratch=run.scratch,
            operand_dtype=run.student.operand_dtype,
        )

    def finish(self) -> tuple[Tensor, Tensor]:
        call, (ce, lse) = self.run.call, self.table
        self.table[0] = ce.where(stream.is_token(call.labels, call.vocab.shard), 0.0)
        return call.weights.loss(lse, ce), self.table
