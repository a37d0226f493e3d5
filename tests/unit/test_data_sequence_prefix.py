"""Sequences that begin with a prefix: manual examples, then every small case against a slow definition."""

import numpy as np
import pytest
import torch

from kdtrain.data.context import Share, cut_sequences
from kdtrain.data.loader import validation_batches
from kdtrain.data.packing import PackingSpec, num_sequences, pack
from kdtrain.documents import Documents
from kdtrain.errors import ConfigError
from tests.support.tiny_data import random_documents, write_store, write_tokenizer

B, C = 200, 201  # of the byte-level vocabulary; no document below holds them


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def rows(packed):
    return [part.tolist() for part in packed]


def test_prefix_joins_continued_document_and_no_token_is_predicted_twice(tmp_path, tokenizer):
    # stream: 5 6 7 0 | 8 0 | 9 10 11 12 13 0 | 14 0
    store = write_store(tmp_path / "store", [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14]], tokenizer)
    packing = PackingSpec(6, sequence_prefix=(B,))
    assert num_sequences(store, packing) == 2
    # a document begins with the sequence: it has no prefix, like all others; the prefix is a separate document
    first = rows(pack(store, 0, packing))
    assert first == [[B, 5, 6, 7, 0, 8], [5, 6, 7, 0, 8, 0], [0, 1, 1, 1, 0, 1], [0, 0, 1, 2, 3, 0]]
    # the last token of a document: its label and that of the prefix do not count
    second = rows(pack(store, 1, packing))
    assert second == [[B, 0, 9, 10, 11, 12], [0, 9, 10, 11, 12, 13], [0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 2, 3]]
    # 13 was the last label of the sequence before; the rest is padding
    third = rows(pack(store, 2, packing))
    assert third == [[B, 13, 0, 14, 0, 0], [13, 0, 14, 0, 0, 0], [0, 1, 0, 1, 0, 0], [0, 1, 2, 0, 1, 0]]


def test_document_that_begins_with_sequence_has_prefix_once(tmp_path, tokenizer):
    # stream: B 5 6 0 | B 7 8 9 0 | B 10 0
    store = write_store(tmp_path / "store", [[5, 6], [7, 8, 9], [10]], tokenizer, prefix=(B,))
    packing = PackingSpec(5, sequence_prefix=(B,))
    assert rows(pack(store, 0, packing)) == [[B, B, 5, 6, 0], [B, 5, 6, 0, B], [0, 1, 1, 1, 0], [0, 0, 1, 2, 3]]
    assert rows(pack(store, 1, packing)) == [[B, B, 7, 8, 9], [B, 7, 8, 9, 0], [0, 1, 1, 1, 1], [0, 0, 1, 2, 3]]
    assert rows(pack(store, 2, packing)) == [[B, 0, B, 10, 0], [0, B, 10, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 1, 2]]


def test_cut_inside_documents_prefix_is_completed(tmp_path, tokenizer):
    # stream: B C 5 0 | B C 6 7 0
    store = write_store(tmp_path / "store", [[5], [6, 7]], tokenizer, prefix=(B, C))
    packing = PackingSpec(7, sequence_prefix=(B, C))
    # token 5 of the stream is the C of the second document, whose B is in the sequence before
    ids, labels, mask, positions = pack(store, 1, packing)
    assert ids.tolist() == [B, B, C, 6, 7, 0, 0]
    assert positions.tolist()[:6] == [0, 0, 1, 2, 3, 4]
    assert labels.tolist()[2:5] == [6, 7, 0]
    assert mask.tolist() == [0, 0, 1, 1, 1, 0, 0]
    # documents without a prefix of their own get the whole one, wherever they are cut
    plain = write_store(tmp_path / "plain", [[5, 6, 7], [8, 9]], tokenizer)
    assert rows(pack(plain, 1, PackingSpec(3, sequence_prefix=(B, C))))[0::3] == [[B, C, 6], [0, 1, 2]]


def test_without_resetting_positions_run_on_from_the_prefix(tmp_path, tokenizer):
    store = write_store(tmp_path / "store", [[5, 6], [7, 8, 9], [10]], tokenizer, prefix=(B,))
    for sequence, ids in ((0, [B, B, 5, 6, 0]), (1, [B, B, 7, 8, 9]), (2, [B, 0, B, 10, 0])):
        found, _, mask, positions = pack(store, sequence, PackingSpec(5, reset_positions=False, sequence_prefix=(B,)))
        assert found.tolist() == ids
        assert positions.tolist() == [0, 1, 2, 3, 4]
        assert mask.tolist() == [0, 1, 1, 1, sequence < 2]


def reference(documents, own, packing, sequence):
    """A sequence token by token: (token, label, counts, position) of its S positions.

    documents: with separators, without prefixes. own: the prefix of each.
    """
    size = len(packing.sequence_prefix)
    stream = [(t, d, i) for d, ids in enumerate(documents) for i, t in enumerate([*own, *ids])]
    start = sequence * (packing.seq_len - size)
    mine = stream[start : start + packing.seq_len - size]
    after = stream[start + 1 : start + 1 + packing.seq_len - size]
    cut_off = mine[0][2]  # tokens of the document in the sequence before
    if not packing.reset_positions:
        joined = size
    elif own == list(packing.sequence_prefix):
        joined = min(cut_off, size)
    else:
        joined = size if cut_off else 0
    shown = list(packing.sequence_prefix[: size - joined]) + list(packing.sequence_prefix[:joined])
    places = list(range(size - joined)) + list(range(joined))
    found = [[t, None, 0, p] for t, p in zip(shown, places, strict=True)]
    for s in range(packing.seq_len - size):
        if s >= len(mine):
            found.append([0, 0, 0, 0 if s == len(mine) else found[-1][3] + 1])  # padding is a document of its own
            continue
        token, document, _ = mine[s]
        label, of, _ = after[s] if s < len(after) else (0, None, 0)
        counts = s < len(after) and (of == document or not packing.reset_positions)
        begins = s > 0 and mine[s - 1][1] != document
        position = 0 if begins or (s == 0 and joined == 0) else found[-1][3] + 1
        found.append([token, label, int(counts), position])
    if not packing.reset_positions:
        found = [[t, label, counts, p] for p, (t, label, counts, _) in enumerate(found)]
    return found


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("prefix", [(), (B,), (B, C), (B, B, C)])
@pytest.mark.parametrize("own", ["none", "the same", "another"])
def test_every_small_case_equals_slow_definition(tmp_path, tokenizer, own, prefix, reset):
    own = {"none": [], "the same": list(prefix), "another": [C, B]}[own]
    for seed in range(3):
        documents = random_documents(12, seed=seed, longest=(3, 7, 20)[seed])
        store = write_store(tmp_path / str(seed), documents, tokenizer, prefix=own, shard_tokens=31)
        ended = [[*ids, 0] for ids in documents]
        for seq_len in range(len(prefix) + 1, 14):
            packing = PackingSpec(seq_len, reset, prefix)
            predicted = np.zeros(store.num_tokens, dtype=int)
            for sequence in range(-(-(store.num_tokens - 1) // packing.stride)):
                ids, labels, mask, positions = pack(store, sequence, packing)
                want = reference(ended, own, packing, sequence)
                assert ids.tolist() == [row[0] for row in want]
                assert positions.tolist() == [row[3] for row in want]
                assert mask.tolist() == [row[2] for row in want]
                assert all(row[1] in (None, label) for label, row in zip(labels.tolist(), want, strict=True))
                assert labels[:-1].tolist() == ids[1:].tolist()
                start = sequence * packing.stride + 1 - len(prefix)
                predicted[[start + s for s in range(seq_len) if mask[s]]] += 1
            starts = store.document_starts(0, store.num_tokens) if reset else [0]
            never = np.zeros(store.num_tokens, dtype=bool)
            never[starts] = True
            assert predicted.tolist() == (~never).astype(int).tolist(), "each token once, but what begins a document"


@pytest.mark.parametrize("prefix", [(B,), (B, C)])
def test_attention_joins_prefix_and_continued_document(tmp_path, tokenizer, prefix):
    store = write_store(tmp_path / "store", random_documents(30, seed=4, longest=9), tokenizer, prefix=prefix)
    packing = PackingSpec(11, sequence_prefix=prefix)
    for sequence in range(num_sequences(store, packing)):
        start, size = sequence * packing.stride, len(prefix)
        positions = torch.from_numpy(pack(store, sequence, packing)[3])[None]
        borders = Documents.of(positions).offsets.tolist()[:-1]
        inside = (store.document_starts(start, start + packing.stride) - start + size).tolist()
        since = start - int(store.document_starts(0, start + 1)[-1])
        apart = size - min(since, size)
        assert borders == sorted({0, apart, *inside})


def test_validation_predicts_every_label_once_whatever_the_prefix_and_the_ranks(tmp_path, tokenizer):
    documents = random_documents(40, seed=1)
    store = write_store(tmp_path / "store", documents, tokenizer, prefix=(B,))
    for batch, ranks, prefix in ((1, 1, (B,)), (3, 2, (B,)), (2, 5, (B, C))):
        total = torch.zeros((), dtype=torch.float64)
        for rank in range(ranks):
            place = {"sequences_per_batch": batch, "share": Share(rank, ranks)}
            for item in validation_batches(store, packing=PackingSpec(17, sequence_prefix=prefix), **place):
                total += item.num_valid_tokens()
        assert total == sum(len(d) + 1 for d in documents)


def test_max_tokens_counts_tokens_of_store(tmp_path, tokenizer):
    store = write_store(tmp_path / "store", random_documents(40, seed=1), tokenizer)

    def sequences(max_tokens):
        packing = PackingSpec(10, sequence_prefix=(B, C))
        return len(list(validation_batches(store, packing=packing, sequences_per_batch=1, max_tokens=max_tokens)))

    assert [sequences(n) for n in (1, 8, 15, 16, 80)] == [1, 1, 1, 2, 10]


def test_context_parallel_parts_cover_whole_sequence(tmp_path, tokenizer):
    store = write_store(tmp_path / "store", random_documents(40, seed=1), tokenizer, prefix=(B,))
    how = {"packing": PackingSpec(12, sequence_prefix=(B,)), "sequences_per_batch": 3}
    whole = next(validation_batches(store, **how))
    parts = [next(validation_batches(store, share=Share(0, 1, rank, 3), **how)) for rank in range(3)]
    for name in ("input_ids", "labels", "loss_mask", "position_ids"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts], dim=1), getattr(whole, name))
        assert torch.equal(getattr(parts[1], name), getattr(cut_sequences(whole, 1, 3), name))
    for left, right in ((0, 1), (1, 2)):  # what debug.check_replicas compares
        assert torch.equal(parts[left].labels[:, -1], parts[right].input_ids[:, 0])


def test_a_prefix_as_long_as_a_sequence_is_refused():
    with pytest.raises(ConfigError, match=r"data.seq_len = 2 leaves no room for tokens behind .* \[200, 201\]"):
        PackingSpec(2, sequence_prefix=(B, C))
