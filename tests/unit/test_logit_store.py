"""Folders of teachers' records: found by key, resumed after a kill, refused by name when damaged or foreign."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kdtrain.data.packing import PackingSpec
from kdtrain.errors import ConfigError, DataError, StoreMismatch
from kdtrain.stores.keys import SequenceKeys
from kdtrain.stores.record_writer import ShardWriter, commit
from kdtrain.teacher import LogitStore
from kdtrain.teacher.stored import logit_store
from kdtrain.teacher.stored.logit_store import Progress, StoreIdentity
from kdtrain.teacher.stored.records import RecordFields, SequenceRecords

ROOT = Path(__file__).resolve().parents[2]
PACKING = PackingSpec(seq_len=16, sequence_prefix=(1,))
IDENTITY = StoreIdentity(
    corpus="ab" * 32,
    packing=PACKING.as_json(),
    tokenizer="cd" * 32,
    teacher={"weights": "ef" * 32, "dtype": "bfloat16", "quantize": None},
    target={"name": "threshold", "tau0": 1 / 32},
    temperature=1.0,
    seed=3,
    forward={"sequences": 4, "length": 16},
    fields=RecordFields(49152, draws="equal"),
    about={"licence": "Apache-2.0", "source": "https://example.org/teacher"},
)
KEYS = SequenceKeys("ab" * 32, PACKING.fingerprint)
BLOCKS = {0: [(0, 3), (3, 2)], 1: [(5, 4), (9, 1)]}
SEQUENCES = [first + number for blocks in BLOCKS.values() for first, count in blocks for number in range(count)]


def records_of(number):
    """16 positions with 2 kept and 3 drawn ids each, of this sequence alone."""
    steps = np.arange(16)
    numbers = -steps.astype(np.float32) - number
    return SequenceRecords(
        kept=np.full(16, 2),
        kept_ids=np.stack([steps * 7 + number, steps * 11 + 9000], 1).reshape(-1),
        kept_weights=np.tile(np.array([0.5, 0.25], np.float32), 16),
        drawn=np.full(16, 3),
        drawn_ids=(steps[:, None] * 100 + np.array([20000, 30000, 40000 + number])).reshape(-1),
        counts=None,
        rest=np.full(16, 0.25, np.float32),
        label_log_prob=numbers,
        entropy=-numbers / 16,
    )


def write(folder, shards=(0, 1), stop=None):
    for shard in shards:
        with LogitStore.create(folder, IDENTITY, shard, 2) as writer:
            for first, count in BLOCKS[shard][len(writer.blocks) : stop]:
                block = writer.add(KEYS.key(first), [records_of(first + number) for number in range(count)])
                assert (block.first, block.count) == (KEYS.key(first), count)
            if stop is None:
                writer.finish()
    if stop is None and len(shards) == 2:
        commit(folder)


def check_records(store, numbers):
    for number in numbers:
        found, given = store[KEYS.key(number)], records_of(number)
        np.testing.assert_array_equal(found.kept_ids, given.kept_ids)
        np.testing.assert_array_equal(found.drawn_ids, given.drawn_ids)
        np.testing.assert_array_equal(found.kept_weights, given.kept_weights)
        np.testing.assert_array_equal(found.label_log_prob, given.label_log_prob)


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "logits")
    return tmp_path / "logits"


def test_records_are_found_by_key(folder):
    store = LogitStore.open(folder, IDENTITY)
    store.verify()
    assert store.complete
    assert store.path == folder
    assert len(store) == len(SEQUENCES)
    assert store.progress == Progress(len(SEQUENCES), 2, 2)
    assert store.identity == IDENTITY
    assert KEYS.key(9) in store
    assert KEYS.key(10) not in store
    check_records(store, reversed(SEQUENCES))
    with pytest.raises(KeyError, match="no record of key"):
        store[SequenceKeys("ab" * 32, "another packing").key(0)]


def test_a_store_is_read_while_it_is_written_and_says_how_far_it_is(tmp_path):
    folder, done = tmp_path / "logits", 0
    for shard, blocks in BLOCKS.items():
        with LogitStore.create(folder, IDENTITY, shard, 2) as writer:
            for first, count in blocks:
                with pytest.raises(KeyError, match=f"which is not finished: {done} records so far"):
                    LogitStore.open(folder)[KEYS.key(first)]
                writer.add(KEYS.key(first), [records_of(first + number) for number in range(count)])
                done += count
                store = LogitStore.open(folder, IDENTITY)
                assert not store.complete
                assert store.progress == Progress(done, shard, 2)
                check_records(store, SEQUENCES[:done])
            writer.finish()
    assert LogitStore.open(folder).progress == Progress(done, 2, 2)
    assert not LogitStore.open(folder).complete


SCRIPT = """
import sys
from tests.unit.test_logit_store import IDENTITY, KEYS, LogitStore, records_of
with LogitStore.create(sys.argv[1], IDENTITY) as writer:
    for n in range(len(writer.blocks), int(sys.argv[2])):
        writer.add(KEYS.key(4 * n), [records_of((4 * n + i) % 1000) for i in range(4)])
    writer.finish()
"""


def test_a_capture_killed_three_times_gives_the_identical_store(tmp_path):
    def run(name, blocks):
        return [sys.executable, "-c", SCRIPT, tmp_path / name, str(blocks)]

    done = 0
    for _ in range(3):
        process = subprocess.Popen(run("killed", 10**9), cwd=ROOT)
        try:
            while not (tmp_path / "killed/identity.json").exists() or len(LogitStore.open(tmp_path / "killed")) <= done:
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = len(LogitStore.open(tmp_path / "killed"))
    for name in ("killed", "whole"):
        subprocess.run(run(name, done // 4 + 3), cwd=ROOT, check=True)
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")


def test_a_thousand_flipped_bits_and_truncations_are_refused_by_name(folder):
    source, content = random.Random(1), content_of(folder)
    places = [(name, place) for name, data in content.items() for place in range(len(data))]
    for number, (name, place) in enumerate(source.choices(places, k=1000)):
        changed = bytearray(content[name])
        if number % 4:
            changed[place] ^= 1 << source.randrange(8)
        else:
            del changed[place:]
        (folder / name).write_bytes(changed)
        with pytest.raises(DataError, match=rf"{name}.*(damaged|reads up to)"):
            LogitStore.open(folder).verify()
        (folder / name).write_bytes(content[name])
    LogitStore.open(folder, IDENTITY).verify()


def test_no_flipped_bit_of_a_shard_reaches_a_reader_that_does_not_verify(folder):
    source, file = random.Random(2), folder / "shard_00000.bin"
    data = file.read_bytes()
    for _ in range(200):
        changed = bytearray(data)
        changed[source.randrange(len(data))] ^= 1 << source.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(DataError, match=r"shard_00000.bin is damaged: the checksum of the record of key"):
            check_records(LogitStore.open(folder), range(5))


def test_swapped_shards_are_refused_by_name(tmp_path):
    folder = tmp_path / "logits"
    for shard in (0, 1):
        with LogitStore.create(folder, IDENTITY, shard, 2) as writer:
            writer.add(KEYS.key(4 * shard), [records_of(0)] * 4)
            writer.finish()
    commit(folder)
    content, names = content_of(folder), ("shard_00000.bin", "shard_00001.bin")
    assert len(content[names[0]]) == len(content[names[1]])
    for name, other in (names, names[::-1]):
        (folder / name).write_bytes(content[other])
    store = LogitStore.open(folder)
    with pytest.raises(DataError, match=r"shard_00000.bin is damaged: the checksum of the record"):
        store[KEYS.key(0)]
    with pytest.raises(DataError, match=r"shard_00000.bin is damaged"):
        store.verify()


CHANGES = {
    "corpus": ("12" * 32, r"corpus: (ab)+ there, (12)+ here"),
    "packing": ({**PACKING.as_json(), "seq_len": 32}, "packing.seq_len: 16 there, 32 here"),
    "tokenizer": ("12" * 32, "tokenizer: (cd)+ there, (12)+ here"),
    "teacher": ({**IDENTITY.teacher, "dtype": "float32"}, "teacher.dtype: bfloat16 there, float32 here"),
    "target": ({"name": "threshold", "tau0": 0.05}, "target.tau0: 0.03125 there, 0.05 here"),
    "temperature": (2.0, "temperature: 1.0 there, 2.0 here"),
    "seed": (4, "seed: 3 there, 4 here"),
    "forward": ({"sequences": 8, "length": 16}, "forward.sequences: 4 there, 8 here"),
    "fields": (RecordFields(49153, draws="equal"), "fields.vocab_size: 49152 there, 49153 here"),
    "about": ({"licence": "MIT"}, r"about.licence: Apache-2.0 there, MIT here"),
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(StoreIdentity)])
def test_a_foreign_store_is_refused_by_the_field_that_differs(folder, name):
    value, message = CHANGES[name]
    foreign = dataclasses.replace(IDENTITY, **{name: value})
    if name == "about":
        LogitStore.open(folder, foreign)
    else:
        with pytest.raises(StoreMismatch, match=f"differ in {message}"):
            LogitStore.open(folder, foreign)
    with pytest.raises(StoreMismatch, match=rf"differ in identity\.{message}"):
        LogitStore.create(folder, foreign, 0, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seq_len", 32), ("reset_positions", False), ("sequence_prefix", ()), ("version", 2)],
)
def test_any_other_packing_is_refused(folder, name, value):
    foreign = dataclasses.replace(IDENTITY, packing=dataclasses.replace(PACKING, **{name: value}).as_json())
    with pytest.raises(StoreMismatch, match=rf"differ in packing\.{name}"):
        LogitStore.open(folder, foreign)


def test_newer_codecs_and_other_records_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(logit_store, "CODEC", 2)
        LogitStore.create(tmp_path / "newer", IDENTITY).close()
    with pytest.raises(DataError, match=r"codec 2; this kdtrain reads up to 1\n  fix: use the kdtrain that wrote it"):
        LogitStore.open(tmp_path / "newer")
    ShardWriter(tmp_path / "scores", {"kind": "scores"}).close()
    with pytest.raises(DataError, match=r"is a folder of records, but not of a teacher's"):
        LogitStore.open(tmp_path / "scores")
    with pytest.raises(DataError, match=r"it has no identity.json"):
        LogitStore.open(tmp_path)


def test_a_wrong_record_leaves_the_store_as_it_was(tmp_path):
    with LogitStore.create(tmp_path / "logits", IDENTITY) as writer:
        writer.add(KEYS.key(0), [records_of(0)])
        before = content_of(tmp_path / "logits")
        wrong = dataclasses.replace(records_of(1), rest=np.full(16, 0.5, np.float32))
        with pytest.raises(ValueError, match=r"position 0: probabilities sum to 1.25"):
            writer.add(KEYS.key(1), [records_of(1), wrong])
        assert content_of(tmp_path / "logits") == before
        with pytest.raises(ConfigError, match="is being written by another process"):
            LogitStore.create(tmp_path / "logits", IDENTITY)
        writer.add(KEYS.key(1), [records_of(1)])
    assert len(LogitStore.open(tmp_path / "logits")) == 2
    assert sorted(os.listdir(tmp_path / "logits")) == ["identity.json", "shard_00000.bin", "shard_00000.journal"]
