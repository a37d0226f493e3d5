"""What an evaluation must report, from float64 logits of stock models: the oracle for tests of `Validation`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from kdtrain.batch import Batch


@torch.no_grad()
def reference_means(student: Any, teacher: Any, batches: Iterable[Batch], vocab_size: int) -> dict[str, float]:
    """Every evaluation metric as a mean over the valid tokens of all batches together.

    student, teacher: stock Hugging Face models, best in float64; rows of their heads at or past vocab_size are left
    out. It holds [T, vocab_size] tensors, so it is for tests on tiny models only.
    """
    sums: dict[str, float] = {}
    count = 0
    for batch in batches:
        valid = batch.loss_mask.flatten() > 0
        labels = batch.labels.flatten()[valid].unsqueeze(1)
        q, p = (
            model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
            .logits.double()
            .flatten(0, 1)[valid, :vocab_size]
            .log_softmax(-1)
            for model in (student, teacher)
        )
        values = {
            "eval/val_nll": -q.gather(1, labels),
            "eval/teacher_nll": -p.gather(1, labels),
            "eval/kl_to_teacher": (p.exp() * (p - q)).sum(-1),
            "eval/top1_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
            "eval/tvd": (p.exp() - q.exp()).abs().sum(-1) / 2,
            "eval/teacher_entropy": -(p.exp() * p).sum(-1),
            "eval/student_entropy": -(q.exp() * q).sum(-1),
        }
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value.sum())
        count += int(valid.sum())
    return {name: total / count for name, total in sums.items()}


@torch.no_grad()
def favour_tokens(model: Any, token_ids: Iterable[int]) -> Any:
    """Make the head's rows of some tokens large, so that random models agree on the likeliest token now and then."""
    for token_id in token_ids:
        model.get_output_embeddings().weight[token_id] *= 6.0
    return model


def uneven_batches(vocab_size: int, shapes: Iterable[tuple[int, int]], seq_len: int = 10) -> list[Batch]:
    """One batch per (sequences, valid tokens of the first sequence); later sequences have two valid tokens less each.

    Every other sequence holds two documents. Token ids, labels and masks depend on nothing but the arguments.
    """
    generator = torch.Generator().manual_seed(5)
    half = seq_len // 2
    batches = []
    for rows, valid in shapes:
        ids, labels = (torch.randint(0, vocab_size, (rows, seq_len), generator=generator) for _ in range(2))
        keep = torch.tensor([max(valid - 2 * row, 0) for row in range(rows)]).unsqueeze(1)
        positions = torch.arange(seq_len).repeat(rows, 1)
        positions[1::2, half:] -= half
        batches.append(Batch(ids, labels, (torch.arange(seq_len) < keep).float(), positions, torch.arange(rows)))
    return batches
