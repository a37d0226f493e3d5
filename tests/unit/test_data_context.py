"""Batches cut over cp ranks: parts cover the whole, keep labels at the cut, and are what the loader returns."""

import pytest
import torch

from kdtrain.batch import Batch
from kdtrain.data.context import Share, cut_sequences
from kdtrain.data.loader import StepLoader, StepShape, validation_batches
from kdtrain.data.packing import PackingSpec
from tests.support.tiny_data import random_documents, write_store, write_tokenizer

CUT = ("input_ids", "labels", "loss_mask", "position_ids")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return write_store(folder / "store", random_documents(20, seed=3), write_tokenizer(folder / "tokenizer"))


def assert_parts_of(parts, whole):
    for name in CUT:
        pieces = [getattr(part, name) for part in parts]
        assert len({piece.shape for piece in pieces}) == 1
        assert torch.equal(torch.cat(pieces, dim=1), getattr(whole, name)), name
    for part in parts:
        assert torch.equal(part.sample_ids, whole.sample_ids)


def test_parts_hold_each_token_once_with_its_label_and_position():
    tokens = torch.arange(26).view(2, 13)
    positions = torch.tensor([[*range(12)], [*range(4), *range(8)]])
    whole = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 12), positions, torch.tensor([7, 8]))
    parts = [cut_sequences(whole, rank, 3) for rank in range(3)]
    assert_parts_of(parts, whole)
    assert parts[1].position_ids.tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert parts[0].labels[0, -1] == parts[1].input_ids[0, 0]
    assert cut_sequences(whole, 0, 1) is whole


def test_sequences_not_divisible_by_cp_are_refused():
    batch = Batch(*(torch.zeros(1, 6) for _ in range(4)), torch.zeros(1))
    with pytest.raises(ValueError, match="part 0 of 4 of sequences of 6 tokens"):
        cut_sequences(batch, 0, 4)
    with pytest.raises(ValueError, match="part 2 of 2"):
        cut_sequences(batch, 2, 2)


def test_loader_and_validation_return_part_of_each_cp_rank(store):
    def step(**part):
        loader = StepLoader(
            [store],
            packing=PackingSpec(8),
            shape=StepShape(4, 2),
            share=Share(1, 2, **part),
            prefetch=0,
        )
        return next(loader)

    for parts, whole in zip(zip(*(step(cp_rank=r, cp_size=4) for r in range(4)), strict=True), step(), strict=True):
        assert_parts_of(parts, whole)

    def batches(**part):
        return list(validation_batches(store, packing=PackingSpec(8), sequences_per_batch=3, share=Share(**part)))

    for *parts, whole in zip(*(batches(cp_rank=r, cp_size=2) for r in range(2)), batches(), strict=True):
        assert_parts_of(parts, whole)
