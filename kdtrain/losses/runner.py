"""The loop that the streamed losses share: chunks of the student's logits, a loss's own arithmetic, gradients.

A loss declares by `StreamedLoss` what differs: what it holds besides the student, what its ranks exchange for a chunk,
and what a chunk's gradient is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from kdtrain_kernels.blocks import Scratch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdtrain.distributed.vocab import HeadShard
from kdtrain.losses import checks, stream
from kdtrain.losses.vocab_group import VocabGroup

Pending = TypeVar("Pending")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Arguments of one call that every streamed loss has. hidden [T, D]; head: this rank's rows; labels [T] global ids.

    main_grad: the caller's buffer for d(head), or None. work: dtype of logits and accumulated gradients.
    """

    hidden: Tensor
    head: HeadShard
    labels: Tensor
    weights: stream.TokenWeights
    vocab: VocabGroup
    slab_bytes: int
    main_grad: Tensor | None
    needs_grad: stream.NeedsGrad
    work: torch.dtype

    @classmethod
    def checked(
        cls,
        hidden: Tensor,
        head: HeadShard,
        labels: Tensor,
        weights: Mapping[str, Any],
        vocab: VocabGroup,
        slab_bytes: int,
        main_grad: Tensor | None,
        work: torch.dtype,
    ) -> Call:
        """The call, if its labels, weights and buffers are valid. The hidden states and the head must be checked.

        weights: argument name -> weight [T]: kd_weight and ce_weight (weight in a loss without a teacher), and
        z_weight, which alone may be None. Raises ValueError.
        """
        given: dict[str, Tensor] = {
            name: weight for name, weight in weights.items() if name != "z_weight" or weight is not None
        }
        checks.check_labels_and_weights(labels, given, hidden)
        checks.check_slab_bytes(slab_bytes, vocab, work)
        checks.check_main_grad(main_grad, head.weight, work)
        ce_weight = given["ce_weight"] if "ce_weight" in given else given["weight"]
        checks.check_label_range(labels, ce_weight, vocab.shard)
        columns = stream.local_labels(labels, vocab.shard)
        return cls(
            hidden=hidden,
            head=head,
            labels=labels,
            weights=stream.TokenWeights.of(
                given.get("kd_weight", ce_weight), ce_weight, given.get("z_weight"), columns
            ),
            vocab=vocab,
            slab_bytes=slab_bytes,
            main_grad=main_grad,
            needs_grad=stream.NeedsGrad.of(hidden, head),
            work=work,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """A call whose memory is allocated: the student's side, cache blocks, tokens per chunk, and chunks in flight."""

    call: Call
    student: stream.ModelSide
    scratch: Scratch
    rows: int
    depth: int

    @classmethod
    def of(cls, call: Call, hidden: Tensor) -> Run:
        """Allocate the student's slabs."""
        rows, depth = stream.chunk_rows(call.slab_bytes, call.vocab, call.work), stream.in_flight(call.vocab)
        student = stream.ModelSide.of(hidden, call.head, call.vocab.shard, rows, depth, call.work)
        return cls(call, student, Scratch.of(student.slabs[0]), rows, depth)

    def table(self, fields: int) -> Tensor:
        """[fields, T] float64 zeros."""
        return torch.zeros(fields, len(self.call.labels), dtype=torch.float64, device=self.call.labels.device)


class Steps(Protocol[Pending]):
    """A loss during a call. Every rank issues and completes the same chunks in the same order."""

    def issue(self, chunk: slice, slot: int) -> Pending:
        """Compute a chunk's logits, in the slabs of `slot`, and start the exchange of its statistics."""

    def complete(self, chunk: slice, pending: Pending) -> Tensor | None:
        """Wait for the exchange and keep the chunk's values; returns d loss / d product [C, n], in the student's slab
        and its operand_dtype, if any gradient is needed."""

    def finish(self) -> tuple[Tensor, Tensor]:
        """(the loss 0-d, values per token [fields, T]), both float64, after the last chunk."""


class StreamedLoss(Protocol):
    """A loss with what it needs besides the arguments that all have."""

    def begin(self, run: Run) -> Steps[Any]:
        """Allocate what it needs for a call."""


def streamed(call: Call, loss: StreamedLoss) -> tuple[Tensor, Tensor]:
    """(loss 0-d, differentiable by hidden, head weight and bias; values per token [fields, T], detached), in call.work.

    Memory: half of slab_bytes for the student's slabs, and what the loss allocates. Communicates what the loss's steps
    do and, if hidden needs a gradient, one all-reduce of [T, D]; nothing in backward.
    """
    with torch.autocast(call.hidden.device.type, enabled=False):
        value, table = _Streamed.apply(call.hidden, call.head.weight, call.head.bias, call, loss)
    return value, table


class _Streamed(torch.autograd.Function):
    """Computes gradients in forward, so that only d(hidden) and d(head) are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call, loss: StreamedLoss
    ) -> tuple[Tensor, Tensor]:
        run = Run.of(call, hidden)
        steps = loss.begin(run)
        grads = stream.GradientBuffers.zeros(hidden, call.head, call.needs_grad, call.work, call.main_grad)

        def complete(chunk: slice, pending: Any) -> None:
            operand = steps.complete(chunk, pending)
            if operand is not None:
                grads.add(run.student, chunk, operand)

        stream.run_pipelined(hidden.shape[0], run.rows, run.depth, steps.issue, complete)
        value, table = steps.finish()
        stream.save_gradients(ctx, grads, (hidden, weight, bias), call.vocab.group, call.main_grad)
        table = table.to(call.work)
        ctx.mark_non_differentiable(table)
        return value.to(call.work), table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_table: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*stream.scaled_gradients(ctx, grad_loss), None, None)
