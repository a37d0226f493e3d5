"""Stores, packing, order and loading from outside: bytes, borders, resumption, and every kind of damage."""

import json
import struct

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from kdtrain.data.loader import StepLoader, validation_batches
from kdtrain.data.order import BlendOrder, permute
from kdtrain.data.packing import Packing, pack
from kdtrain.data.prepare import PrepareSettings, prepare_corpus
from kdtrain.data.token_store import TokenStore, TokenStoreWriter
from kdtrain.data.tokenizer_compare import compare_tokenizers
from kdtrain.errors import ConfigError, DataError, StoreMismatch

WORDS = ["<|endoftext|>", "[UNK]", *(f"w{i}" for i in range(98))]


@pytest.fixture
def tokenizer_dir(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_store(folder, tokenizer_dir, documents, **options):
    with TokenStoreWriter(folder, tokenizer_dir, 0, source="test", **options) as writer:
        for ids in documents:
            writer.add(ids, text_bytes=len(ids))
        writer.commit()
    return TokenStore.open(folder)


def random_documents(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 100, size=int(rng.integers(1, 30))).tolist() for _ in range(count)]


def test_a_store_is_a_megatron_pair_byte_for_byte(tmp_path, tokenizer_dir):
    write_store(tmp_path / "s", tokenizer_dir, [[5, 6, 7], [8]])
    tokens = np.array([5, 6, 7, 0, 8, 0], dtype=np.uint16)
    assert (tmp_path / "s/shard_00000.bin").read_bytes() == tokens.tobytes()
    want = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i", 4, 2)
    want += struct.pack("<2q", 0, 8) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "s/shard_00000.idx").read_bytes() == want


@pytest.mark.parametrize("shard_tokens", [1, 40, 10**6])
def test_documents_stream_and_borders_come_back_from_any_sharding(tmp_path, tokenizer_dir, shard_tokens):
    documents = random_documents(37)
    store = write_store(tmp_path / "s", tokenizer_dir, documents, shard_tokens=shard_tokens)
    stream = [t for ids in documents for t in (*ids, 0)]
    starts = np.cumsum([0, *(len(ids) + 1 for ids in documents)])[:-1]
    assert len(store) == 37
    assert [store[i].tolist() for i in range(37)] == [[*ids, 0] for ids in documents]
    for start, stop in ((0, store.num_tokens), (3, 3), (17, 91), (store.num_tokens - 1, store.num_tokens)):
        assert store.tokens(start, stop).tolist() == stream[start:stop]
        assert store.document_starts(start, stop).tolist() == [s for s in starts if start <= s < stop]
    store.verify()


def test_packing_masks_borders_and_restarts_positions(tmp_path, tokenizer_dir):
    store = write_store(tmp_path / "s", tokenizer_dir, [[5, 6], [7], [8, 9, 10, 11]])
    ids, labels, mask, positions = pack(store, 0, Packing(6))
    assert ids.tolist() == [5, 6, 0, 7, 0, 8]
    assert labels.tolist() == [6, 0, 7, 0, 8, 9]
    assert mask.tolist() == [1, 1, 0, 1, 0, 1]
    assert positions.tolist() == [0, 1, 2, 0, 1, 0]
    _, _, mask, positions = pack(store, 0, Packing(6, reset_positions=False))
    assert mask.tolist() == [1] * 6
    assert positions.tolist() == list(range(6))


def test_the_permutation_is_one_and_depends_on_every_key():
    for size in (1, 2, 7, 64, 1000):
        assert sorted(permute(np.arange(size), size, 1, 2)) == list(range(size))
    assert permute(np.arange(1000), 1000, 1, 2).tolist() != permute(np.arange(1000), 1000, 1, 3).tolist()


def test_a_blend_holds_its_shares_and_uses_every_sequence_once_per_epoch():
    order = BlendOrder([50, 7], [3.0, 1.0], seed=5)
    drawn = [order[i] for i in range(4000)]
    assert sum(store == 0 for store, _ in drawn) / 4000 == pytest.approx(0.75, abs=0.02)
    first = [k for store, k in drawn if store == 0]
    assert sorted(first[:50]) == list(range(50))
    assert first[:50] != first[50:100]


def steps(store, number, **layout):
    loader = StepLoader([store], packing=Packing(8), sequences_per_step=8, seed=3, **layout)
    try:
        return [next(loader) for _ in range(number)]
    finally:
        loader.close()


def test_neither_dp_nor_micro_batch_nor_prefetch_changes_a_step(tmp_path, tokenizer_dir):
    store = write_store(tmp_path / "s", tokenizer_dir, random_documents(60))
    whole = [s[0].sample_ids.tolist() for s in steps(store, 5, sequences_per_micro_batch=8, prefetch=0)]
    halves = [steps(store, 5, sequences_per_micro_batch=2, dp_rank=r, dp_size=2, prefetch=3) for r in range(2)]
    for step, ids in enumerate(whole):
        assert [i for half in halves for batch in half[step] for i in batch.sample_ids.tolist()] == ids


def test_a_resumed_loader_goes_on_where_it_was_in_another_layout(tmp_path, tokenizer_dir):
    store = write_store(tmp_path / "s", tokenizer_dir, random_documents(60))
    want = [s[0].input_ids for s in steps(store, 5, sequences_per_micro_batch=8)]
    first = StepLoader([store], packing=Packing(8), sequences_per_step=8, sequences_per_micro_batch=8, seed=3)
    next(first), next(first)
    state = json.loads(json.dumps(first.state_dict(16)))
    first.close()
    layout = {"sequences_per_micro_batch": 4, "prefetch": 0}
    second = StepLoader([store], packing=Packing(8), sequences_per_step=8, seed=3, **layout)
    second.load_state_dict(state)
    for ids in want[2:]:
        parts = [batch.input_ids for batch in next(second)]
        assert np.array_equal(np.concatenate(parts), ids)


def test_another_seed_or_corpus_is_refused_by_name(tmp_path, tokenizer_dir):
    store = write_store(tmp_path / "s", tokenizer_dir, random_documents(60))
    options = {"packing": Packing(8), "sequences_per_step": 8, "sequences_per_micro_batch": 8}
    state = StepLoader([store], seed=3, **options).state_dict(8)
    with pytest.raises(StoreMismatch, match="seed"):
        StepLoader([store], seed=4, **options).load_state_dict(state)
    other = write_store(tmp_path / "t", tokenizer_dir, random_documents(60, seed=1))
    with pytest.raises(StoreMismatch):
        StepLoader([other], seed=3, **options).load_state_dict(state)


def test_validation_covers_every_label_once_with_equal_batches_per_rank(tmp_path, tokenizer_dir):
    store = write_store(tmp_path / "s", tokenizer_dir, random_documents(11))
    options = {"packing": Packing(8), "sequences_per_batch": 2}
    ranks = [list(validation_batches(store, dp_rank=r, dp_size=3, **options)) for r in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    counted = sum(float(batch.loss_mask.sum()) for batches in ranks for batch in batches)
    assert counted == store.num_tokens - len(store)  # all but what follows a separator, and the first token


class LostDisk:
    """A store whose disk goes away after it was opened."""

    def __init__(self, store):
        self.manifest, self.num_tokens, self.document_starts = store.manifest, store.num_tokens, store.document_starts

    def tokens(self, start, stop):
        raise OSError("disk is gone")


def test_an_error_in_the_prefetching_thread_reaches_the_loop(tmp_path, tokenizer_dir):
    store = LostDisk(write_store(tmp_path / "s", tokenizer_dir, random_documents(20)))
    layout = {"sequences_per_step": 4, "sequences_per_micro_batch": 4}
    loader = StepLoader([store], packing=Packing(8), seed=3, prefetch=2, **layout)
    with pytest.raises(OSError, match="disk is gone"):
        next(loader)
    loader.close()


def test_damage_is_named(tmp_path, tokenizer_dir):
    write_store(tmp_path / "s", tokenizer_dir, random_documents(20))
    path = tmp_path / "s/shard_00000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"shard_00000\.bin is truncated"):
        TokenStore.open(tmp_path / "s")
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(DataError, match=r"shard_00000\.bin is damaged"):
        TokenStore.open(tmp_path / "s").verify()
    path.unlink()
    with pytest.raises(DataError, match=r"shard_00000\.bin"):
        TokenStore.open(tmp_path / "s")


def test_an_aborted_store_leaves_nothing_behind(tmp_path, tokenizer_dir):
    def abort():
        with TokenStoreWriter(tmp_path / "out/s", tokenizer_dir, 0, source="x") as writer:
            writer.add([5], 1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        abort()
    assert not list((tmp_path / "out").iterdir())
    write_store(tmp_path / "out/s", tokenizer_dir, [[5, 6]])
    with pytest.raises(ConfigError, match="exists already"):
        TokenStoreWriter(tmp_path / "out/s", tokenizer_dir, 0, source="x")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", b"w1 \xff w2", DataError, r"a\.txt: invalid UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "w1"}\n{"text": \n', DataError, r"a\.jsonl:2"),
        ("a.jsonl", b'{"body": "w1"}\n', DataError, r"a\.jsonl:1: no text under 'text'"),
        ("a.txt", b"  \n", DataError, "no documents"),
    ],
)
def test_bad_text_is_refused_with_its_place_and_nothing_written(tmp_path, tokenizer_dir, name, content, error, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        prepare_corpus([tmp_path / name], tokenizer_dir, tmp_path / "out", PrepareSettings(workers=1))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_stores_do_not_depend_on_the_number_of_workers(tmp_path, tokenizer_dir):
    lines = [json.dumps({"text": " ".join(f"w{i % 90}" for i in range(k))}) for k in range(1, 150)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for workers in (1, 2):
        settings = PrepareSettings(validation_share=0.2, workers=workers)
        prepare_corpus([tmp_path / "a.jsonl"], tokenizer_dir, tmp_path / f"out{workers}", settings)
    for split in ("train", "validation"):
        one, two = (TokenStore.open(tmp_path / f"out{w}" / split).manifest.fingerprint for w in (1, 2))
        assert one == two


def test_unlike_tokenizers_are_told_apart_by_a_probe(tmp_path, tokenizer_dir):
    other = tmp_path / "other"
    other.mkdir()
    found = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(found))
    assert compare_tokenizers(tokenizer_dir, other).difference is None
    found["model"]["vocab"]["Hello"] = 100
    (other / "tokenizer.json").write_text(json.dumps(found))
    assert "100" in compare_tokenizers(tokenizer_dir, other).difference
