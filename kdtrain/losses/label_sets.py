"""Cross-entropy of one model on several sets of labels, with its logits computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.dispatch import row_kernels
from kdtrain_kernels.matmul import work_dtype
from torch import Tensor

from kdtrain.distributed.collectives import Group, start_gather
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import checks, stream
from kdtrain.losses.types import LossParts
from kdtrain.losses.vocab_group import VocabGroup

LABEL = 3
"""Column of the label's logit in the statistics of a row."""


@torch.no_grad()
def cross_entropy_of_label_sets(
    hidden: Tensor,
    head: Tensor | HeadShard,
    label_sets: Sequence[Tensor],
    *,
    weight: Tensor,
    shard: VocabShard,
    group: Group = None,
    slab_bytes: int = stream.DEFAULT_SLAB_BYTES,
    backend: str = "auto",
) -> list[LossParts]:
    """What `linear_cross_entropy` returns under no_grad for each of `label_sets`, bit for bit; at least one.

    label_sets: each [T], global ids; the other arguments, memory and errors are those of `linear_cross_entropy`.
    Communicates over `group`: one all-gather of [C, 3 + number of sets] per chunk, hidden behind the next chunk.
    """
    head, vocab, work = stream.as_head(head), VocabGroup(shard, group), work_dtype(hidden)
    checks.check_model("", hidden, head, shard)
    checks.check_slab_bytes(slab_bytes, vocab, work)
    for labels in label_sets:
        checks.check_labels_and_weights(labels, {"weight": weight}, hidden)
        checks.check_label_range(labels, weight, shard)
    kernels = row_kernels(backend, hidden.device, work)
    rows, depth = stream.chunk_rows(slab_bytes, vocab, work), stream.in_flight(vocab)
    side = stream.ModelSide.of(hidden, head, shard, rows, depth, work)
    scratch = Scratch.of(side.slabs[0])
    columns = [stream.local_labels(labels, shard) for labels in label_sets]
    nll = torch.zeros(len(label_sets), hidden.shape[0], dtype=torch.float64, device=hidden.device)
    lse = torch.zeros(hidden.shape[0], dtype=torch.float64, device=hidden.device)

    def issue(chunk: slice, slot: int) -> Callable[[], Tensor]:
        logits = side.logits(chunk, slot)
        stats = kernels.row_stats(logits, columns[0][chunk], 1.0, scratch)
        others = [_picked(logits, of_set[chunk]) for of_set in columns[1:]]
        # all ranks need the statistics of the whole vocabulary
        return start_gather(torch.cat([stats, *others], 1), group)

    def complete(chunk: slice, gathered: Callable[[], Tensor]) -> None:
        found = gathered()
        for number in range(len(label_sets)):
            stats = torch.cat([found[..., :LABEL], found[..., LABEL + number : LABEL + number + 1]], -1)
            totals = kernels.merge_stats(stats, 1.0)
            nll[number, chunk], lse[chunk] = totals.label_nll(), totals.lse()

    with torch.autocast(hidden.device.type, enabled=False):
        stream.run_pipelined(hidden.shape[0], rows, depth, issue, complete)
    answers = []
    for labels, of_set, ce in zip(label_sets, columns, nll, strict=True):
        ce = ce.where(stream.is_token(labels, shard), 0.0)
        loss = stream.TokenWeights.of(weight, weight, None, of_set).loss(lse, ce)
        answers.append(LossParts(loss=loss.to(work), ce=ce.to(work), lse=lse.to(work)))
    return answers


def _picked(logits: Tensor, columns: Tensor) -> Tensor:
    """[C, 1] float64: each row's logit in its column, 0 where the column is -1."""
    if logits.shape[1] == 0:
        return torch.zeros(logits.shape[0], 1, dtype=torch.float64, device=logits.device)
    picked = logits.gather(1, columns.clamp(min=0)[:, None]).double()
    return picked.where(columns[:, None] >= 0, 0.0)
