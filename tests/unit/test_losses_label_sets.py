"""Several sets of labels at once: the values of one call per set, bit for bit, and the same refusals."""

import pytest
import torch

from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import linear_cross_entropy
from kdtrain.losses.label_sets import cross_entropy_of_label_sets
from tests.support.loss_cases import cut_head, random_case


def arguments(vocab, properties):
    case = random_case(37, vocab, properties=properties)
    shard = VocabShard.of(vocab)
    head = cut_head(case.head_s, shard)
    return case, head, {"weight": case.ce_weight, "shard": shard, "slab_bytes": 1 << 20}


@pytest.mark.parametrize("vocab", [101, 3000])
@pytest.mark.parametrize("properties", [False, True])
def test_each_set_has_the_bits_of_a_call_of_its_own(vocab, properties):
    case, head, settings = arguments(vocab, properties)
    is_token = case.labels >= 0
    sets = [((case.labels + shift) % vocab).where(is_token, case.labels) for shift in (0, 1, 50)]
    with torch.no_grad():
        expected = [linear_cross_entropy(case.hidden_s, head, labels, **settings) for labels in sets]
    found = cross_entropy_of_label_sets(case.hidden_s, head, sets, **settings)
    for want, got in zip(expected, found, strict=True):
        for name in ("loss", "ce", "lse"):
            assert torch.equal(getattr(want, name), getattr(got, name)), name
            assert getattr(want, name).dtype == getattr(got, name).dtype


def test_every_set_is_checked():
    case, head, settings = arguments(101, properties=False)
    with pytest.raises(ValueError, match="labels"):
        cross_entropy_of_label_sets(case.hidden_s, head, [case.labels, case.labels[:-1]], **settings)
    beyond = torch.full_like(case.labels, 101)
    with pytest.raises(ValueError, match="label"):
        cross_entropy_of_label_sets(case.hidden_s, head, [case.labels, beyond], **settings)
