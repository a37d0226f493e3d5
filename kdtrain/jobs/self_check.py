"""Check before the first step that the teacher predicts the labels of the training data."""

from __future__ import annotations

import torch

from kdtrain.batch import Batch
from kdtrain.distributed.collectives import reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import StoreMismatch
from kdtrain.teacher.signal import HeadLayout
from kdtrain.teacher.signal_measures import nll_sums
from kdtrain.teacher.source import SignalSource


@torch.no_grad()
def check_alignment(source: SignalSource, batch: Batch, layout: HeadLayout, mesh: Mesh) -> dict[str, float]:
    """Teacher's cross-entropy (nats per token) on the labels and on the labels shifted by -1 and +1 positions.

    If the teacher predicts the previous or the next-but-one token better than the label, then labels, tokenizer or
    weights do not belong together. Every rank must call it with its own batch; all get the same sums. Communicates
    over tp (the loss's statistics) and one all-reduce over dp and cp. Raises StoreMismatch with the three values.
    """
    signal = source.signal(batch)
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
