"""The bytes of teachers' records: ids come back exactly, probabilities within the stated rounding, damage is named."""

import dataclasses
import hashlib
import random

import numpy as np
import pytest
import torch

from kdtrain.distributed.vocab import VocabShard
from kdtrain.errors import DataError
from kdtrain.losses import linear_sparse_kd_loss
from kdtrain.teacher import sample_targets
from kdtrain.teacher.estimators import ESTIMATORS, UNBIASED, WITH_TAIL
from kdtrain.teacher.stored.bits import Reader, pack_fixed, pack_golomb
from kdtrain.teacher.stored.codec import ROUNDING, SMALLEST, decode, encode
from kdtrain.teacher.stored.records import RecordFields, SequenceRecords

FIELDS = {
    "top-k": RecordFields(50),
    "top-k and tail": RecordFields(2**16 - 1, tail=True),
    "threshold": RecordFields(2**16, draws="equal"),
    "counts": RecordFields(2**20 + 7, draws="counts", samples=50),
    "head and counts": RecordFields(300, draws="counts", samples=12, boundary=True),
    "largest vocabulary": RecordFields(2**31, draws="equal"),
    "hidden states": RecordFields(2**16, tail=True, boundary=True, hidden_size=5),
    "float32 states": RecordFields(7, draws="equal", hidden_size=3, hidden_dtype="float32"),
}


def records_of(fields, size, seed=0, widest=12):
    """Random records of `size` positions, widths of 0 to `widest`; entries in random order."""
    source = np.random.default_rng(seed)
    draws = fields.draws != "none"
    kept = source.integers(0, widest + 1, size)
    drawn = np.where(source.random(size) < 0.9, source.integers(1, 13, size), 0) if draws else np.zeros(size, int)
    kept_ids, drawn_ids, weights, rest = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0)], []
    for m, n in zip(kept, drawn, strict=True):
        pick = random.Random(int(source.integers(1 << 40)))
        ids = np.array(pick.sample(range(fields.vocab_size), min(m + n, fields.vocab_size)), dtype=np.int64)
        kept_ids.append(ids[:m])
        drawn_ids.append(ids[m : m + n])
        parts = source.dirichlet(np.full(len(kept_ids[-1]) + 1, 0.3))
        if len(parts) > 1 and not (fields.tail or len(drawn_ids[-1])):
            parts[-1], parts[0] = 0.0, parts[0] + parts[-1]
        weights.append(parts[:-1])
        rest.append(parts[-1])
    numbers = source.normal(-3, 2, (3, size)).astype(np.float32)
    drawn = np.array([len(ids) for ids in drawn_ids[1:]], dtype=int)
    state_type = {"bfloat16": np.uint16, "float32": np.float32}[fields.hidden_dtype]
    return SequenceRecords(
        kept=np.array([len(ids) for ids in kept_ids[1:]], dtype=int),
        kept_ids=np.concatenate(kept_ids),
        kept_weights=np.concatenate(weights).astype(np.float32),
        drawn=drawn,
        drawn_ids=np.concatenate(drawn_ids),
        counts=source.integers(1, 9, drawn.sum()) if fields.draws == "counts" else None,
        rest=np.array(rest, dtype=np.float32),
        label_log_prob=numbers[0],
        entropy=numbers[1],
        boundary=numbers[2] if fields.boundary else None,
        hidden=source.integers(0, 999, (size, fields.hidden_size)).astype(state_type) if fields.hidden_size else None,
    )


def in_order(per_row, ids, *others):
    """Entries by position, then id."""
    order = np.lexsort((ids, np.arange(len(per_row)).repeat(per_row)))
    return [values[order] for values in (ids, *others) if values is not None]


@pytest.mark.parametrize("size", [0, 1, 2, 333])
@pytest.mark.parametrize("kind", FIELDS)
def test_records_come_back_with_exact_ids_and_weights_within_rounding(kind, size):
    fields = FIELDS[kind]
    given = records_of(fields, size)
    found = decode(encode(given, fields), fields)
    assert len(found) == size
    for name in ("kept", "drawn", "hidden"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given, name))
    ids, weights = in_order(given.kept, given.kept_ids, given.kept_weights.astype(float))
    np.testing.assert_array_equal(found.kept_ids, ids)
    for mine, theirs in zip(
        (found.drawn_ids, found.counts), in_order(given.drawn, given.drawn_ids, given.counts), strict=False
    ):
        np.testing.assert_array_equal(mine, theirs)
    rows = np.arange(size).repeat(given.kept)
    for mine, exact in ((found.kept_weights, weights), (found.rest, given.rest.astype(float))):
        largest = np.maximum(given.rest, np.full(size, 0.0))
        np.maximum.at(largest, rows, weights)
        others = (1 - largest)[rows if exact is weights else slice(None)]
        is_largest = exact == (largest[rows] if exact is weights else largest)
        bound = np.where(is_largest, ROUNDING * others + 13 * SMALLEST + 2e-6, ROUNDING * exact * 1.001 + SMALLEST)
        assert (np.abs(mine - exact) <= bound).all()
        assert ((mine == 0) == (exact == 0))[~is_largest].all()
    totals = np.bincount(rows, weights=found.kept_weights, minlength=size) + found.rest
    np.testing.assert_allclose(totals, 1, atol=1e-6)
    for name in ("label_log_prob", "entropy", *(("boundary",) if fields.boundary else ())):
        np.testing.assert_allclose(getattr(found, name), getattr(given, name), rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("vocab_size", [2**16 - 1, 2**16, 2**20 + 7, 2**31])
def test_first_and_last_id_of_any_vocabulary(vocab_size):
    fields = RecordFields(vocab_size, draws="equal")
    ids = np.array([0, vocab_size - 1, 1, vocab_size - 2])
    numbers = np.zeros(2, np.float32)
    given = SequenceRecords(
        *(np.array([2, 1]), ids[:3], np.array([0.5, 0.25, 0.9], np.float32)),
        *(np.array([0, 1]), ids[3:], None, np.array([0.25, 0.1], np.float32), numbers, numbers),
    )
    with pytest.raises(ValueError, match=r"position 0: probabilities sum to 1.0 with 0.25 outside the kept ids"):
        encode(given, fields)
    given = dataclasses.replace(given, drawn=np.array([1, 0]))
    with pytest.raises(ValueError, match="position 1"):
        encode(given, fields)
    given = dataclasses.replace(
        given, kept_weights=np.array([0.5, 0.25, 1.0], np.float32), rest=np.array([0.25, 0.0], np.float32)
    )
    found = decode(encode(given, fields), fields)
    assert [*found.kept_ids, *found.drawn_ids] == ids.tolist()
    with pytest.raises(DataError, match=r"is outside the vocabulary of 9"):
        decode(encode(given, fields), RecordFields(9, draws="equal"))


def test_widths_beyond_a_byte():
    fields = RecordFields(5000, tail=True)
    weights = np.full(700, 0.5 / 700, np.float32)
    numbers = np.zeros(1, np.float32)
    given = SequenceRecords(
        *(np.array([700]), np.arange(0, 4900, 7), weights, np.array([0]), np.zeros(0, int), None),
        *(np.array([0.5], np.float32), numbers, numbers),
    )
    found = decode(encode(given, fields), fields)
    np.testing.assert_array_equal(found.kept_ids, given.kept_ids)
    np.testing.assert_allclose(found.kept_weights, weights, rtol=ROUNDING)


def test_numbers_of_every_width_come_back_from_bits():
    source = np.random.default_rng(3)
    for bits in range(32):
        for count in (0, 1, 9, 200):
            values = source.integers(0, 1 << bits, count)
            if bits < 32:
                assert Reader(pack_fixed(values)).fixed(count).tolist() == values.tolist()
            if bits < 31:
                assert Reader(pack_golomb(values)).golomb(count).tolist() == values.tolist()


def test_bytes_depend_on_the_records_alone():
    for kind, fields in FIELDS.items():
        given = records_of(fields, 40, seed=5)
        data = encode(given, fields)
        order = np.lexsort((-given.kept_ids, np.arange(40).repeat(given.kept)))
        shuffled = {"kept_ids": given.kept_ids[order], "kept_weights": given.kept_weights[order]}
        assert encode(dataclasses.replace(given, **shuffled), fields) == data, kind


def test_bytes_of_version_1_stay_readable():
    """The digest is that of version 1: other bytes need another version, and a reader of both."""
    fields = RecordFields(2**20 + 7, draws="counts", samples=6, boundary=True, hidden_size=1)
    kept, numbers = np.arange(40) % 5, np.arange(40, dtype=np.float32) / 8
    rest = np.float32(1) - kept.astype(np.float32) / 8
    ids = (np.arange(kept.sum()) * 7919) % (2**20 + 7)
    given = SequenceRecords(
        *(kept, ids, np.full(len(ids), 1 / 8, np.float32), np.full(40, 3), (np.arange(120) * 104729) % 2**20),
        *(1 + np.arange(120) % 3, rest, -numbers, numbers, -2 * numbers, np.arange(40, dtype=np.uint16)[:, None]),
    )
    data = encode(given, fields)
    assert hashlib.sha256(data).hexdigest() == "37ee53893740842ab707d5e9f046db0854023f6471ac86309357527cbcc8711d"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept_ids": np.array([3, 3, 5])}, "position 0: a kept id occurs twice"),
        ({"kept_ids": np.array([3, 4, 50])}, r"ids of 3 to 50 are not in \[0, 50\)"),
        ({"kept_ids": np.array([-1, 4, 5])}, r"ids of -1 to 5 are not in"),
        ({"kept_weights": np.array([0.5, 0.5, 0.4], np.float32)}, "position 1: probabilities sum to 0.4"),
        ({"kept_weights": np.array([1.5, -0.5, 1.0], np.float32)}, "probabilities sum to"),
        ({"rest": np.array([np.nan, 0.0], np.float32)}, "position 0: probabilities sum to nan"),
        ({"entropy": np.array([0.0, np.nan], np.float32)}, "position 1: .* entropy nan"),
        ({"drawn": np.array([1, 0]), "drawn_ids": np.array([9])}, "have drawn ids, the store's fields say none"),
        ({"counts": np.zeros(0, int)}, "counts is given, the store's fields say otherwise"),
        ({"hidden": np.zeros((2, 3), np.uint16)}, "hidden is given"),
        ({"label_log_prob": np.zeros(3, np.float32)}, r"label_log_prob has shape \(3,\), need \(2,\)"),
        ({"kept": np.array([2, 2])}, r"kept_ids has shape \(3,\), need \(4,\)"),
    ],
)
def test_records_that_cannot_be_stored_are_refused(change, message):
    numbers, no_ids = np.zeros(2, np.float32), np.zeros(0, int)
    given = SequenceRecords(
        *(np.array([2, 1]), np.array([4, 3, 5]), np.array([0.5, 0.5, 1.0], np.float32)),
        *(np.array([0, 0]), no_ids, None, np.zeros(2, np.float32), numbers, numbers),
    )
    fields = RecordFields(50)
    assert decode(encode(given, fields), fields).kept_ids.tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match=message):
        encode(dataclasses.replace(given, **change), fields)


def test_hidden_states_of_another_dtype_are_not_converted():
    fields = FIELDS["hidden states"]
    given = records_of(fields, 3)
    with pytest.raises(ValueError, match="hidden has dtype float32, need uint16"):
        encode(dataclasses.replace(given, hidden=given.hidden.astype(np.float32)), fields)


@pytest.mark.parametrize(
    "wrong",
    [
        {"vocab_size": 0},
        {"vocab_size": 2**31 + 1},
        {"draws": "some"},
        {"draws": "counts"},
        {"samples": 3},
        {"tail": True, "draws": "equal"},
        {"hidden_size": 4, "hidden_dtype": "int8"},
    ],
)
def test_fields_that_contradict_each_other_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("tail", "tail bucket").replace("_size", "_")):
        RecordFields(**{"vocab_size": 9, **wrong})


@pytest.mark.parametrize("kind", ["threshold", "head and counts", "hidden states"])
def test_damaged_bytes_are_refused_or_are_other_records_and_never_another_error(kind):
    fields, source = FIELDS[kind], random.Random(2)
    data = encode(records_of(fields, 20), fields)
    for size in range(len(data)):
        with pytest.raises(DataError, match="are no records of a sequence"):
            decode(data[:size], fields)
    with pytest.raises(DataError, match="1 bytes follow the last part"):
        decode(data + b"x", fields)
    refused = 0
    for _ in range(500):
        changed = bytearray(data)
        changed[source.randrange(len(data))] ^= 1 << source.randrange(8)
        try:
            decode(bytes(changed), fields)
        except DataError:
            refused += 1
    assert refused > 20


def target_of(estimator, **settings):
    torch.manual_seed(0)
    hidden, head = torch.randn(64, 16), torch.randn(1024, 16)
    places = torch.arange(64)
    return sample_targets(
        *(hidden, head),
        **{"estimator": estimator, "k": 12, "seed": 1, "sample_ids": places // 32, "positions": places % 32},
        labels=places,
        shard=VocabShard.of(1024, 0, 1),
        **settings,
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_of_the_library_is_stored_within_rounding(estimator):
    settings = {"top_k_samples": {"tail_samples": 5}, "top_p_k": {"top_p": 0.9}}.get(estimator, {})
    target = target_of(estimator, **settings)
    draws = "none" if estimator not in UNBIASED else "equal" if estimator.endswith("threshold") else "counts"
    samples = settings.get("tail_samples", 12) if draws == "counts" else 0
    fields = RecordFields(1024, draws=draws, samples=samples, tail=estimator in WITH_TAIL)
    records = decode(encode(SequenceRecords.of_target(target, fields), fields), fields)
    found = records.to_target(fields, width=12)
    assert found.unbiased == target.unbiased
    dense = [torch.zeros(64, 1025).scatter_(1, t.ids.long() % 1025, t.weights) for t in (target, found)]
    torch.testing.assert_close(dense[1], dense[0], rtol=2 * ROUNDING, atol=ROUNDING / 10)
    assert (dense[0][:, :1024] > 0).sum(1).tolist() == (records.kept + records.drawn).tolist()
    if target.log_tail is not None:
        torch.testing.assert_close(found.log_tail, target.log_tail, rtol=0, atol=2 * ROUNDING)
    torch.testing.assert_close(found.label_log_prob, target.label_log_prob, rtol=2**-11, atol=0)
    torch.testing.assert_close(found.entropy, target.entropy, rtol=2**-11, atol=0)
    losses = []
    for each in (target, found):
        hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        head = torch.randn(1024, 8, generator=torch.Generator().manual_seed(2))
        parts = linear_sparse_kd_loss(
            *(hidden, head, each, torch.arange(64)),
            kd_weight=torch.ones(64),
            ce_weight=torch.zeros(64),
            shard=VocabShard.of(1024, 0, 1),
            allow_biased=not (found.unbiased or fields.tail),
        )
        parts.loss.backward()
        losses.append((parts.loss.detach(), hidden.grad))
    torch.testing.assert_close(losses[1][0], losses[0][0], rtol=2e-3, atol=0)
    torch.testing.assert_close(losses[1][1], losses[0][1], rtol=5e-3, atol=5e-3)


def test_a_width_too_small_for_the_records_is_refused():
    fields = FIELDS["threshold"]
    with pytest.raises(ValueError, match=r"has \d+ ids, more than width = 2"):
        records_of(fields, 9).to_target(fields, width=2)
