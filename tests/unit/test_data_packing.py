"""Sequences cut from the token stream: manual examples, then comparison with a slow definition."""

import numpy as np
import pytest
import torch

from kdtrain.data.context import Share
from kdtrain.data.loader import validation_batches
from kdtrain.data.packing import PackingSpec, num_sequences, pack, sequence_keys
from tests.support.tiny_data import random_documents, write_store, write_tokenizer

NUMBER = (1 << 40) - 1
"""Bits of a key that hold the number of the sequence."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def store(tmp_path, tokenizer):
    # stream, documents separated: 5 6 7 0 | 8 0 | 9 10 11 12 13 0 | 14 0
    return write_store(tmp_path / "store", [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14]], tokenizer)


def rows(packed):
    return [part.tolist() for part in packed]


def test_labels_masks_and_positions_equal_manual_example(store):
    assert num_sequences(store, PackingSpec(5)) == 2
    first = rows(pack(store, 0, PackingSpec(5)))
    assert first == [[5, 6, 7, 0, 8], [6, 7, 0, 8, 0], [1, 1, 1, 0, 1], [0, 1, 2, 3, 0]]
    # begins with the last token of a document; the third document continues after the last label
    assert rows(pack(store, 1, PackingSpec(5))) == [
        [0, 9, 10, 11, 12],
        [9, 10, 11, 12, 13],
        [0, 1, 1, 1, 1],
        [0, 0, 1, 2, 3],
    ]
    assert rows(pack(store, 2, PackingSpec(5))) == [
        [13, 0, 14, 0, 0],
        [0, 14, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 1, 0, 1, 0],
    ]


def test_border_after_last_input_masks_its_label(store):
    # the label of position 3 is the first token of the second document
    assert rows(pack(store, 0, PackingSpec(4))) == [[5, 6, 7, 0], [6, 7, 0, 8], [1, 1, 1, 0], [0, 1, 2, 3]]
    # a document that begins exactly with the sequence
    assert rows(pack(store, 1, PackingSpec(4))) == [[8, 0, 9, 10], [0, 9, 10, 11], [1, 0, 1, 1], [0, 1, 0, 1]]


def test_without_resetting_every_position_counts_and_positions_run_on(store):
    ids, labels, mask, positions = pack(store, 0, PackingSpec(5, reset_positions=False))
    assert (ids.tolist(), labels.tolist()) == ([5, 6, 7, 0, 8], [6, 7, 0, 8, 0])
    assert (mask.tolist(), positions.tolist()) == ([1] * 5, [0, 1, 2, 3, 4])
    assert pack(store, 2, PackingSpec(5, reset_positions=False))[2].tolist() == [1, 1, 1, 0, 0]  # padding never counts


def test_padding_does_not_lengthen_the_document_before_it(store):
    # [13] ends the third document, then the fourth with its separator, then six tokens that are not in the store
    assert pack(store, 1, PackingSpec(10))[3].tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 4, 5]
    assert pack(store, 1, PackingSpec(10, reset_positions=False))[3].tolist() == list(range(10))


def test_a_sequence_needs_one_token_more_than_it_holds(store):
    assert store.num_tokens == 14
    assert [num_sequences(store, PackingSpec(s)) for s in (1, 6, 7, 13, 14, 99)] == [13, 2, 1, 1, 0, 0]


def test_a_sequence_outside_the_store_is_refused(store):
    with pytest.raises(IndexError, match="sequence 3"):
        pack(store, 3, PackingSpec(5))
    with pytest.raises(IndexError, match="sequence -1"):
        pack(store, -1, PackingSpec(5))


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 61])
def test_packing_agrees_with_a_slow_definition(tmp_path, tokenizer, seq_len):
    documents = random_documents(23, seed=seq_len, longest=25)
    store = write_store(tmp_path / "store", documents, tokenizer, shard_tokens=31)
    stream = [(t, d, i) for d, ids in enumerate(documents) for i, t in enumerate([*ids, 0])]
    for sequence in range(-(-(len(stream) - 1) // seq_len)):
        ids, labels, mask, positions = pack(store, sequence, PackingSpec(seq_len))
        begin = sequence * seq_len
        for s in range(seq_len):
            here, following = ([*stream, None, *[None] * seq_len][begin + s + k] for k in (0, 1))
            counts = here is not None and following is not None and here[1] == following[1]
            assert mask[s] == counts
            if here is not None:
                assert ids[s] == here[0]
                since = next(k for k in range(s + 1) if k == s or stream[begin + s - k - 1][1] != here[1])
                assert positions[s] == since
            if following is not None:
                assert labels[s] == following[0]


def test_every_label_inside_a_document_counts_exactly_once(tmp_path, tokenizer):
    documents = random_documents(40, seed=1)
    store = write_store(tmp_path / "store", documents, tokenizer)
    for batch, ranks in ((1, 1), (3, 2), (2, 5)):
        total = torch.zeros((), dtype=torch.float64)
        for rank in range(ranks):
            place = {"share": Share(rank, ranks)}
            for item in validation_batches(store, packing=PackingSpec(17), sequences_per_batch=batch, **place):
                total += item.num_valid_tokens()
        assert total == sum(len(d) for d in documents)


@pytest.mark.parametrize("packing", [PackingSpec(3), PackingSpec(3, reset_positions=False)])
def test_keys_of_validation_are_those_of_store_packing_and_number(store, packing):
    found = [
        int(key)
        for batch in validation_batches(store, packing=packing, sequences_per_batch=1)
        for key in batch.sample_ids
    ]
    assert found == [sequence_keys(store, packing).key(number) for number in range(len(found))]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
def test_validation_gives_each_rank_as_many_batches_of_the_same_shape(store, dp_size):
    per_rank = [
        list(validation_batches(store, packing=PackingSpec(3), sequences_per_batch=2, share=Share(r, dp_size)))
        for r in range(dp_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    assert {tuple(b.input_ids.shape) for batches in per_rank for b in batches} == {(2, 3)}
    seen = [
        int(i)
        for batches in per_rank
        for b in batches
        for i, mask in zip(b.sample_ids & NUMBER, b.loss_mask, strict=True)
        if mask.any()
    ]
    wanted = [k for k in range(5) if pack(store, k, PackingSpec(3))[2].any()]
    assert sorted(seen) == wanted


def test_validation_stops_after_max_tokens_but_returns_one_sequence(store):
    def sequences(max_tokens):
        batches = validation_batches(store, packing=PackingSpec(3), sequences_per_batch=1, max_tokens=max_tokens)
        return [int(b.sample_ids[0]) & NUMBER for b in batches]

    assert sequences(None) == [0, 1, 2, 3, 4]
    assert sequences(7) == [0, 1]
    assert sequences(1) == [0]
    assert sequences(10**9) == [0, 1, 2, 3, 4]


def test_batch_has_documented_dtypes(store):
    batch = next(validation_batches(store, packing=PackingSpec(3), sequences_per_batch=2))
    kinds = [batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype, batch.sample_ids.dtype]
    assert kinds == [torch.int64] * 4
    assert batch.loss_mask.dtype == torch.float32
    assert np.array_equal(batch.input_ids[1].numpy(), pack(store, 1, PackingSpec(3))[0])
