"""The loader over the order of sequences: one order in every layout, resumable from one integer."""

import itertools
import json
import threading
from dataclasses import fields, replace

import pytest
import torch

from kdtrain.data.context import Share
from kdtrain.data.loader import StepLoader, StepShape, sequence_prefix_of
from kdtrain.data.order import BlendOrder, numbering_of
from kdtrain.data.packing import PackingSpec
from kdtrain.errors import DataError, StoreMismatch
from tests.support.tiny_data import random_documents, write_store, write_tokenizer

SEQ = 8


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    tokenizer = write_tokenizer(folder / "tokenizer")
    return [
        write_store(folder / str(n), random_documents(count, seed=n), tokenizer) for n, count in enumerate((20, 9, 31))
    ]


def loader(stores, *, micro=2, rank=0, ranks=1, seed=7, weights=(0.5, 0.2, 0.3), **more):
    settings = {"prefetch": 0, "packing": PackingSpec(SEQ)} | more
    return StepLoader(stores, weights, shape=StepShape(12, micro), share=Share(rank, ranks), seed=seed, **settings)


def samples(steps):
    return [int(i) for step in steps for batch in step for i in batch.sample_ids]


def take(source, count):
    return [next(source) for _ in range(count)]


@pytest.mark.parametrize("prefix", [(), (7,), (7, 9)])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)])
def test_the_samples_of_a_step_are_the_same_in_any_layout(stores, ranks, micro, prefix):
    packing = PackingSpec(SEQ, sequence_prefix=prefix)
    reference = take(loader(stores, packing=packing), 5)
    per_rank = [take(loader(stores, rank=r, ranks=ranks, micro=micro, packing=packing), 5) for r in range(ranks)]
    assert all(tuple(row[: len(prefix)]) == prefix for batch in reference[0] for row in batch.input_ids.tolist())
    for number in range(5):
        together = [batch for steps in per_rank for batch in steps[number]]
        assert {len(b.sample_ids) for b in together} == {micro}
        for name in ("sample_ids", "input_ids", "labels", "loss_mask", "position_ids"):
            mine = torch.cat([getattr(b, name) for b in together])
            assert torch.equal(mine, torch.cat([getattr(b, name) for b in reference[number]])), name


def test_a_sample_id_names_store_and_sequence_and_its_tokens(stores):
    by_path, source = {str(store.path): store for store in stores}, loader(stores)
    for step in take(source, 3):
        for batch in step:
            for sample, ids in zip(batch.sample_ids.tolist(), batch.input_ids, strict=True):
                path, sequence = source.keys.decode(sample)
                assert ids.tolist() == by_path[path].tokens(sequence * SEQ, (sequence + 1) * SEQ).tolist()


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, 3), (4, 1)])
@pytest.mark.parametrize("prefix", [(), (7,)])
def test_resumed_loader_returns_same_sequences_as_uninterrupted_one(stores, prefetch, ranks, micro, prefix):
    packing = PackingSpec(SEQ, sequence_prefix=prefix)
    reference = samples(take(loader(stores, packing=packing), 9))
    first = loader(stores, prefetch=2, packing=packing)
    seen = samples(take(first, 4))
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    assert state["sequences"] == 48
    parts = []
    for rank in range(ranks):
        resumed = loader(stores, rank=rank, ranks=ranks, micro=micro, prefetch=prefetch, packing=packing)
        next(resumed)  # a loader that already worked is set back too
        resumed.load_state_dict(state)
        parts.append(take(resumed, 5))
        resumed.close()
    for number in range(5):
        seen += samples([steps[number] for steps in parts])
    assert seen == reference
    started = loader(stores, prefetch=prefetch, packing=packing)
    started.seek(48)
    assert samples(take(started, 5)) == reference[48:]
    started.close()


def test_prefetching_does_not_change_saved_position(stores):
    ahead = loader(stores, prefetch=4)
    take(ahead, 3)
    assert ahead.state_dict()["sequences"] == 36
    ahead.close()


OTHER = {"seq_len": 9, "reset_positions": False, "sequence_prefix": (7,), "version": 2}
"""Another value for each field of the packing."""


@pytest.mark.parametrize("field", [field.name for field in fields(PackingSpec)])
def test_another_value_of_any_field_of_the_packing_is_refused_by_name(stores, field):
    assert field in OTHER, "give each new field another value here"
    state = json.loads(json.dumps({**loader(stores).state_dict(), "sequences": 24}))
    other = loader(stores, packing=replace(PackingSpec(SEQ), **{field: OTHER[field]}))
    there, here = PackingSpec(SEQ).as_json()[field], other.state_dict()["packing"][field]
    for refuse in (other.check_state, other.load_state_dict):
        with pytest.raises(StoreMismatch) as caught:
            refuse(state)
        for text in (field.replace("version", "packing rule"), f"{there} in the checkpoint", f"{here} here", "fix:"):
            assert text in str(caught.value)
    assert {int(i) for i in samples(take(other, 9))}.isdisjoint(samples(take(loader(stores), 9)))


def test_field_of_a_newer_packing_is_refused_by_name(stores):
    state = {**loader(stores).state_dict(), "sequences": 24}
    state["packing"]["sentences"] = True
    with pytest.raises(StoreMismatch, match=r"data\.sentences: True in the checkpoint, None here"):
        loader(stores).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "name", "values"),
    [
        ({"seed": 8}, "run.seed", ("7", "8")),
        ({"weights": (0.4, 0.3, 0.3)}, "data.train_weights", ("[0.5, 0.2, 0.3]", "[0.4, 0.3, 0.3]")),
        ({"weights": None}, "data.train_weights", ("[0.5, 0.2, 0.3]", "None")),
    ],
)
def test_another_order_is_refused_with_both_values(stores, change, name, values):
    state = {**loader(stores).state_dict(), "sequences": 24}
    other = loader(stores, **change)
    for refuse in (other.check_state, other.load_state_dict):
        with pytest.raises(StoreMismatch) as caught:
            refuse(state)
        for text in (name, f"{values[0]} in the checkpoint", f"{values[1]} here", "fix:"):
            assert text in str(caught.value)
    loader(stores).check_state(state)


def test_weights_are_refused_if_the_checkpoint_has_none(stores):
    state = {**loader(stores, weights=None).state_dict(), "sequences": 24}
    loader(stores, weights=None).check_state(state)
    with pytest.raises(StoreMismatch, match=r"None in the checkpoint, \[0.5, 0.2, 0.3\] here"):
        loader(stores).check_state(state)


def test_another_corpus_is_refused_with_both_fingerprints(stores):
    state = {**loader(stores[:2], weights=None).state_dict(), "sequences": 24}
    with pytest.raises(StoreMismatch) as caught:
        loader([stores[0], stores[2]], weights=None).load_state_dict(state)
    assert "data.train" in str(caught.value)
    for store in stores:
        assert store.manifest.fingerprint in str(caught.value)
    with pytest.raises(StoreMismatch, match=r"data\.train"):
        loader(stores, weights=None).load_state_dict(state)


@pytest.mark.parametrize("weights", [None, (0.5, 0.2, 0.3)])
@pytest.mark.parametrize("listed", list(itertools.permutations(range(3))))
def test_the_order_of_the_list_of_stores_changes_no_draw(stores, weights, listed):
    reference = loader(stores, weights=weights)
    permuted = None if weights is None else [weights[place] for place in listed]
    other = loader([stores[place] for place in listed], weights=permuted)
    for one, two in zip(take(reference, 9), take(other, 9), strict=True):
        for mine, theirs in zip(one, two, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine.tensors(), theirs.tensors(), strict=True))
    assert other.draws(300) == [reference.draws(300)[place] for place in listed]
    assert other.state_dict() == reference.state_dict()
    reference.seek(48)
    other.load_state_dict(reference.state_dict())
    assert samples(take(other, 3)) == samples(take(reference, 3))


def old_state(stores, listed, sequences, weights):
    """A state as it was before `packing` was recorded, when stores were numbered as they were listed."""
    fingerprints = [stores[place].manifest.fingerprint for place in listed]
    weights = None if weights is None else [weights[place] for place in listed]
    more = {"stores": fingerprints, "weights": weights, "seq_len": SEQ, "reset_positions": True}
    return {"sequences": sequences, "seed": 7, "sequence_prefix": [], **more}


@pytest.mark.parametrize("weights", [None, (0.5, 0.2, 0.3)])
@pytest.mark.parametrize("listed", list(itertools.permutations(range(3))))
def test_older_state_keeps_numbers_by_the_order_of_its_list(stores, weights, listed):
    sizes = [(stores[place].num_tokens - 1) // SEQ for place in listed]
    order_then = BlendOrder(sizes, None if weights is None else [weights[place] for place in listed], 7)
    resumed = loader(stores, weights=weights)
    resumed.load_state_dict(old_state(stores, listed, 36, weights))
    place_of = {str(store.path): place for place, store in enumerate(stores)}
    drawn = [resumed.keys.decode(key) for key in samples(take(resumed, 6))]
    assert [(place_of[path], number) for path, number in drawn] == [
        (listed[store], number) for store, number in (order_then[36 + position] for position in range(72))
    ]
    kept = resumed.state_dict()["stores"]  # and the next checkpoint keeps these numbers
    assert kept == [stores[place].manifest.fingerprint for place in listed]


def test_state_without_prefix_means_no_prefix(stores):
    state = old_state(stores, range(3), 24, (0.5, 0.2, 0.3))
    del state["sequence_prefix"]
    assert sequence_prefix_of(state) == ()
    loader(stores).load_state_dict(state)
    with pytest.raises(StoreMismatch, match=r"\[\] in the checkpoint, \[7\] here"):
        loader(stores, packing=PackingSpec(SEQ, sequence_prefix=(7,))).load_state_dict(state)
    state["sequence_prefix"] = [7]
    assert sequence_prefix_of(state) == (7,)
    assert sequence_prefix_of(loader(stores, packing=PackingSpec(SEQ, sequence_prefix=(7, 9))).state_dict()) == (7, 9)


def test_refused_stores_are_named_by_their_place_in_the_list():
    for numbering in ([0, 1, 2], [2, 0, 1]):
        with pytest.raises(DataError, match=r"data\.train\[1\] has a share of"):
            BlendOrder([5, 5, 5], [1.0, 1e-9, 1.0], 1, numbering)
    assert numbering_of(["c", "a", "b"]) == [1, 2, 0]
    assert numbering_of(["c", "a", "b"], ["b", "c", "a"]) == [2, 0, 1]


def test_a_store_listed_twice_is_refused(stores):
    with pytest.raises(StoreMismatch, match="have the same keys"):
        loader([stores[0], stores[0]], weights=None)


def test_a_step_that_cannot_be_divided_is_refused(stores):
    for ranks, micro in ((5, 1), (2, 4)):
        with pytest.raises(ValueError, match="not a multiple"):
            loader(stores, ranks=ranks, micro=micro)


class Failing:
    """A store whose tokens cannot be read after some time, as on a disk that fails."""

    def __init__(self, store, reads):
        self.manifest, self.num_tokens, self.path = store.manifest, store.num_tokens, store.path
        self._store, self._left = store, reads

    def tokens(self, start, stop):
        self._left -= 1
        if self._left < 0:
            raise OSError(5, "Input/output error")
        return self._store.tokens(start, stop)

    def document_starts(self, start, stop):
        return self._store.document_starts(start, stop)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_prefetch_error_is_raised_at_its_step(stores, prefetch):
    broken = StepLoader(
        [Failing(stores[0], 2 * 4)],
        packing=PackingSpec(SEQ),
        shape=StepShape(4, 2),
        prefetch=prefetch,
    )
    take(broken, 2)  # what could be read is handed out
    for _ in range(2):  # and asking again does not hang
        with pytest.raises(OSError, match="Input/output error"):
            next(broken)
    broken.close()


def test_close_ends_thread_and_reading_can_continue(stores):
    before = threading.active_count()
    ahead = loader(stores, prefetch=2)
    seen = samples(take(ahead, 2))
    assert threading.active_count() == before + 1
    ahead.close()
    ahead.close()
    assert threading.active_count() == before
    seen += samples(take(ahead, 2))
    ahead.close()
    assert seen == samples(take(loader(stores), 4))
