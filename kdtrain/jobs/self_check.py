"""Check before the first step that the teacher predicts the labels of the training data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.distributed.collectives import reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import StoreMismatch
from kdtrain.losses.label_sets import cross_entropy_of_label_sets
from kdtrain.teacher.signal import DenseSignal
from kdtrain.teacher.signal_loss import HeadLayout
from kdtrain.teacher.source import TeacherSource


def nll_sum(signal: DenseSignal, labels: Tensor, mask: Tensor, layout: HeadLayout) -> Tensor:
    """Cross-entropy of a teacher's signal on `labels`, weighted with `mask` (both [B, S]) and summed; 0-d float64.

    Replicated over tp, to be summed over the ranks with other tokens. Communicates as `nll_sums` of one set.
    """
    return nll_sums(signal, [labels], mask, layout)[0]


@torch.no_grad()
def nll_sums(signal: DenseSignal, label_sets: Sequence[Tensor], mask: Tensor, layout: HeadLayout) -> list[Tensor]:
    """`nll_sum` of each of `label_sets`; the teacher's logits are computed once.

    Communicates as cross_entropy_of_label_sets and, where replicas share a teacher, one all-gather over them for the
    mask and for each set.
    """
    resharding, weight = signal.resharding, mask.reshape(-1)
    flat = [labels.reshape(-1) for labels in label_sets]
    shard, group = (layout.shard, layout.group) if resharding is None else (resharding.shard, resharding.group)
    if resharding is not None:
        # the loss is taken over the tokens of all replicas that share the teacher
        weight, flat = resharding.gather(weight), [resharding.gather(labels) for labels in flat]
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
    return [(part if resharding is None else resharding.local_parts(part)).loss.double() for part in parts]


@torch.no_grad()
def check_alignment(teacher: TeacherSource, batch: Batch, layout: HeadLayout, mesh: Mesh) -> dict[str, float]:
    """Teacher's cross-entropy (nats per token) on the labels and on the labels shifted by -1 and +1 positions.

    If the teacher predicts the previous or the next-but-one token better than the label, then labels, tokenizer or
    weights do not belong together. Every rank must call it with its own batch; all get the same sums. Communicates
    over tp (the loss's statistics) and one all-reduce over dp and cp. Raises StoreMismatch with the three values.
    """
    signal = teacher.signal(batch)
    ids = batch.input_ids
    after_next = torch.cat([batch.labels[:, 1:], batch.labels[:, -1:]], dim=1)
    # The last position has no next-but-one label; it is masked in all three, so that they cover the same tokens.
    mask = batch.loss_mask.clone()
    mask[:, -1] = 0.0

    own = nll_sums(signal, (batch.labels, ids, after_next), mask, layout)
    sums = torch.stack([*own, mask.sum(dtype=torch.float64)])
    # all ranks must come to the same decision: an error on one alone would leave the others waiting
    *totals, count = reduce_sum_(sums, mesh.zero_group).tolist()
    found = dict(zip(("label", "previous", "after_next"), (total / max(count, 1.0) for total in totals), strict=True))
    if count and not found["label"] < min(found["previous"], found["after_next"]):
        raise StoreMismatch(
            "the teacher does not predict the labels of data.train\n"
            f"  teacher's cross-entropy on the labels: {found['label']:.3f} nats/token; on labels shifted by -1: "
            f"{found['previous']:.3f}, by +1: {found['after_next']:.3f}; the first must be the smallest\n"
            "  why: the store was made with another tokenizer, or the teacher's weights are wrong\n"
            "  fix: prepare the corpus with the teacher's own tokenizer; debug.self_check=false skips this check"
        )
    return found
