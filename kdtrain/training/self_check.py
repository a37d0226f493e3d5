"""Does this teacher belong to these tokens? Asked before the first step, answered with numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdtrain.data.batch import Batch
from kdtrain.dist.collectives import reduce_sum_
from kdtrain.dist.mesh import Mesh
from kdtrain.errors import StoreMismatch
from kdtrain.losses.label_sets import cross_entropy_of_label_sets
from kdtrain.objectives.base import HeadLayout
from kdtrain.objectives.distill import TeacherSource
from kdtrain.teacher.signal import DenseSignal


def nll_sum(signal: DenseSignal, labels: Tensor, mask: Tensor, layout: HeadLayout) -> Tensor:
    """A teacher's cross-entropy on `labels`, weighted with `mask` (both [B, S]) and summed; 0-d float64.

    Replicated over tp, to be summed over the ranks with other tokens. Communicates as `nll_sums` of one set.
    """
    return nll_sums(signal, [labels], mask, layout)[0]


@torch.no_grad()
def nll_sums(signal: DenseSignal, label_sets: Sequence[Tensor], mask: Tensor, layout: HeadLayout) -> list[Tensor]:
    """`nll_sum` of each of `label_sets`; the teacher's logits are computed once.

    Communicates as cross_entropy_of_label_sets and, where replicas share a teacher, one all-gather over them for the
    mask and for each set.
    """
    spread, weight = signal.spread, mask.reshape(-1)
    flat = [labels.reshape(-1) for labels in label_sets]
    shard, group = (layout.shard, layout.group) if spread is None else (spread.shard, spread.group)
    if spread is not None:
        # the loss is taken over the tokens of all replicas that share the teacher
        weight, flat = spread.gather(weight), [spread.gather(labels) for labels in flat]
    parts = cross_entropy_of_label_sets(
        signal.hidden_states,
        signal.head,
        flat,
        weight=weight,
        shard=shard,
        group=group,
        slab_bytes=layout.slab_bytes,
        backend=layout.backend,
    )
    return [(part if spread is None else spread.own(part)).loss.double() for part in parts]


@torch.no_grad()
def check_alignment(teacher: TeacherSource, batch: Batch, layout: HeadLayout, mesh: Mesh) -> dict[str, float]:
    """Teacher's cross-entropy (nats per token) on the labels and on the labels shifted by -1 and +1 positions.

    A teacher that predicts the previous or the next-but-one token better than the label means that labels, tokenizer
    or weights are not what they are said to be. Every rank must call it, with its own batch; all judge the same sums.
    Communicates over tp (the loss's statistics) and one all-reduce over dp and cp. Raises StoreMismatch with the three
    values.
    """
    signal = teacher.signal(batch)
    ids = batch.input_ids
    after_next = torch.cat([batch.labels[:, 1:], batch.labels[:, -1:]], dim=1)
    # The last position has no next-but-one label; leave it out of all three so that they compare like with like.
    mask = batch.loss_mask.clone()
    mask[:, -1] = 0.0

    own = nll_sums(signal, (batch.labels, ids, after_next), mask, layout)
    sums = torch.stack([*own, mask.sum(dtype=torch.float64)])
    *totals, count = reduce_sum_(sums, mesh.zero_group).tolist()
    found = dict(zip(("label", "previous", "after_next"), (total / max(count, 1.0) for total in totals), strict=True))
    if count and not found["label"] < min(found["previous"], found["after_next"]):
        raise StoreMismatch(
            "the teacher does not predict the labels of data.train\n"
            f"  teacher's cross-entropy on the labels: {found['label']:.3f} nats/token; on labels shifted by -1: "
            f"{found['previous']:.3f}, by +1: {found['after_next']:.3f}; the first must be the smallest\n"
            "  why: the store was made with another tokenizer, or the teacher's weights are not what they should be\n"
            "  fix: prepare the corpus with the teacher's own tokenizer; debug.self_check=false skips this check"
        )
    return found
