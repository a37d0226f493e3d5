"""Token stores: the bytes on disk, and refusal of damaged or unfinished stores."""

import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from kdtrain.data import token_store
from kdtrain.data.megatron_index import read_index
from kdtrain.data.token_store import TokenStore, TokenStoreWriter
from kdtrain.errors import EXIT_DATA, ConfigError, DataError
from tests.support.tiny_data import random_documents, write_store, write_tokenizer

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def store(tmp_path, tokenizer):
    return write_store(tmp_path / "store", DOCUMENTS, tokenizer)


def by_hand(documents, code, kind):
    """A Megatron pair written field by field from the format's description."""
    sizes = [len(d) for d in documents]
    width = struct.calcsize(kind)
    data = b"".join(struct.pack(f"<{len(d)}{kind}", *d) for d in documents)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes)
    pointers = [width * sum(sizes[:i]) for i in range(len(sizes))]
    index += struct.pack(f"<{len(sizes)}q", *pointers)
    index += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    return data, index


def test_the_files_are_megatrons_byte_for_byte(store):
    data, index = by_hand([[*d, 0] for d in DOCUMENTS], 8, "H")
    assert (store.path / "shard_00000.bin").read_bytes() == data
    assert (store.path / "shard_00000.idx").read_bytes() == index


def test_a_vocabulary_beyond_sixteen_bits_is_written_as_int32(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(token_store, "vocab_size", lambda folder: 65536)
    store = write_store(tmp_path / "store", [[65535, 3]], tokenizer)
    data, index = by_hand([[65535, 3, 0]], 4, "i")
    assert (store.path / "shard_00000.bin").read_bytes() == data
    assert (store.path / "shard_00000.idx").read_bytes() == index
    assert store[0].tolist() == [65535, 3, 0]


def test_documents_and_totals_come_back(store):
    assert [store[i].tolist() for i in range(len(store))] == [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 13, 0]]
    assert (len(store), store.num_tokens, store.manifest.text_bytes) == (3, 12, 9)
    assert (store.manifest.vocab_size, store.manifest.separator_id) == (257, 0)
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            store[outside]


@pytest.mark.parametrize("shard_tokens", [1, 7, 50, 10**9])
def test_the_stream_and_document_starts_do_not_depend_on_shards(tmp_path, tokenizer, shard_tokens):
    documents = random_documents(37, seed=3)
    store = write_store(tmp_path / "store", documents, tokenizer, shard_tokens=shard_tokens)
    stream = [t for d in documents for t in [*d, 0]]
    starts = np.cumsum([0, *(len(d) + 1 for d in documents)])[:-1]
    assert store.tokens(0, store.num_tokens).tolist() == stream
    assert [store[i].tolist() for i in range(37)] == [[*d, 0] for d in documents]
    for begin, end in ((0, 0), (0, 1), (5, 6), (13, 200), (int(starts[4]), int(starts[9])), (700, len(stream))):
        assert store.tokens(begin, end).tolist() == stream[begin:end]
        assert store.document_starts(begin, end).tolist() == [s for s in starts if begin <= s < end]
    with pytest.raises(IndexError):
        store.tokens(0, len(stream) + 1)


def test_two_stores_of_the_same_text_are_the_same_bytes(tmp_path, tokenizer, store):
    other = write_store(tmp_path / "other", DOCUMENTS, tokenizer)
    for file in ("manifest.json", "shard_00000.bin", "shard_00000.idx", "tokenizer/tokenizer.json"):
        assert (store.path / file).read_bytes() == (other.path / file).read_bytes()
    changed = write_store(tmp_path / "changed", [*DOCUMENTS[:2], [9, 10, 11, 12, 14]], tokenizer)
    assert changed.manifest.fingerprint != store.manifest.fingerprint


def test_a_store_keeps_every_file_of_its_tokenizer_and_none_of_a_model(tmp_path, tokenizer):
    folder = tmp_path / "model"
    shutil.copytree(tokenizer, folder)
    for name in ("merges.txt", "vocab.json", "tokenizer.model", "model.safetensors", "config.json"):
        (folder / name).write_text(name)
    store = write_store(tmp_path / "store", DOCUMENTS, folder)
    kept = {path.name for path in (store.path / "tokenizer").iterdir()}
    assert kept == {path.name for path in folder.iterdir()} - {"model.safetensors", "config.json"}
    assert (store.path / "tokenizer/tokenizer.model").read_text() == "tokenizer.model"


@pytest.mark.parametrize("file", ["shard_00000.bin", "shard_00000.idx", "manifest.json"])
def test_a_file_cut_anywhere_is_refused_at_opening_and_named(store, file):
    whole = (store.path / file).read_bytes()
    for length in sorted({0, 1, 9, min(33, len(whole) - 1), len(whole) // 2, len(whole) - 2}):
        (store.path / file).write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            TokenStore.open(store.path)
        assert file in str(caught.value)
        assert "fix:" in str(caught.value)
        if file.startswith("shard"):
            assert f"{length} bytes" in str(caught.value)
            assert f", {len(whole)} " in str(caught.value)
    (store.path / file).unlink()
    with pytest.raises(DataError, match=file.replace(".", r"\.")):
        TokenStore.open(store.path)


@pytest.mark.parametrize("file", ["shard_00001.bin", "shard_00000.idx"])
def test_verify_names_the_shard_with_one_flipped_bit(tmp_path, tokenizer, file):
    store = write_store(tmp_path / "store", DOCUMENTS, tokenizer, shard_tokens=5)
    store.verify()
    data = bytearray((store.path / file).read_bytes())
    data[-1] ^= 1
    (store.path / file).write_bytes(data)
    with pytest.raises(DataError, match=f"{file} is damaged: sha256"):
        store.verify()


def test_verify_detects_exchanged_tokenizer(tmp_path, store):
    shutil.copy(write_tokenizer(tmp_path / "other", lowercase=True) / "tokenizer.json", store.path / "tokenizer")
    with pytest.raises(DataError, match="is not the tokenizer that made the tokens"):
        TokenStore.open(store.path).verify()


def test_an_index_whose_sequences_overlap_is_refused(store):
    path = store.path / "shard_00000.idx"
    data = bytearray(path.read_bytes())
    pointer_of_second = 34 + 3 * 4 + 8
    data[pointer_of_second : pointer_of_second + 8] = struct.pack("<q", 6)
    path.write_bytes(data)
    with pytest.raises(DataError, match="sequence 0 of 3 does not end where the next begins"):
        TokenStore.open(store.path)


def test_a_sequence_of_negative_size_is_refused_even_if_pointers_agree_with_it(tmp_path):
    path = tmp_path / "x.idx"
    data, index = by_hand([[1, 2, 3], [4], [5, 6]], 8, "H")
    # sizes 3, -1, 4 at bytes 0, 6, 4: each begins where the one before ends
    sizes, pointers = struct.pack("<3i", 3, -1, 4), struct.pack("<3q", 0, 6, 4)
    path.write_bytes(index[:34] + sizes + pointers + index[34 + len(sizes) + len(pointers) :])
    assert read_index(path).num_tokens == len(data) // 2
    with pytest.raises(DataError, match="sequence 1 of 3 does not end where the next begins"):
        read_index(path).check(path)
    sizes, pointers = struct.pack("<3i", 3, 4, -1), struct.pack("<3q", 0, 6, 14)
    path.write_bytes(index[:34] + sizes + pointers + index[34 + len(sizes) + len(pointers) :])
    with pytest.raises(DataError, match="sequence 2 of 3 does not end where the next begins"):
        read_index(path).check(path)


def test_index_of_another_format_is_refused(tmp_path):
    path = tmp_path / "x.idx"
    path.write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(DataError, match="not a Megatron index"):
        read_index(path)
    path.write_bytes(by_hand([[1]], 9, "H")[1])
    with pytest.raises(DataError, match="dtype code 9"):
        read_index(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; this kdtrain reads"),
        ({"format": "other"}, "format 'other'"),
        ({"num_tokens": 13}, "13 tokens"),
        ({"dtype": "float32"}, "'float32'"),
        ({"surprise": 1}, "surprise"),
        ({"shards": [], "num_tokens": 0, "num_documents": 0}, "lists no shards"),
        ({"shards": [{"name": "x"}]}, "is damaged"),
    ],
)
def test_inconsistent_manifest_is_refused(store, change, message):
    file = store.path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=message):
        TokenStore.open(store.path)


def test_folder_without_manifest_is_refused_with_fix(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"no manifest\.json\n  fix: make one with launch/prepare_corpus\.py") as caught:
        TokenStore.open(tmp_path / "missing")
    assert caught.value.exit_code == EXIT_DATA
    write_store(tmp_path / "corpus" / "train", DOCUMENTS, tokenizer)
    with pytest.raises(DataError, match=r"fix: name .*corpus/train"):
        TokenStore.open(tmp_path / "corpus")


def test_a_store_without_documents_is_not_written(tmp_path, tokenizer):
    with (
        pytest.raises(DataError, match="no documents"),
        TokenStoreWriter(tmp_path / "store", tokenizer, 0, source="") as writer,
    ):
        writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_a_token_outside_the_vocabulary_is_named(tmp_path, tokenizer):
    with TokenStoreWriter(tmp_path / "store", tokenizer, 0, source="") as writer:
        writer.add([256], 1)
        for bad in (257, -1):
            with pytest.raises(DataError, match=rf"document 1: token {bad} is not in \[0, 257\)"):
                writer.add([3, bad], 2)


def test_an_existing_folder_is_never_overwritten(store, tokenizer):
    with pytest.raises(ConfigError, match="exists already"):
        TokenStoreWriter(store.path, tokenizer, 0, source="")
    store.verify()


def test_a_store_appears_only_when_committed(tmp_path, tokenizer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with TokenStoreWriter(tmp_path / "left", tokenizer, 0, source="") as writer:
        writer.add([1, 2], 2)
        writer.write_all()
    assert list(tmp_path.iterdir()) == []
    for step in ("fsync", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(DataError, match="No space left on device"):
                write_store(tmp_path / "full", DOCUMENTS, tokenizer)
        assert list(tmp_path.iterdir()) == []
    assert len(write_store(tmp_path / "full", DOCUMENTS, tokenizer)) == 3


def test_tokens_are_flushed_before_manifest(tmp_path, tokenizer, monkeypatch):
    synced, fsync = [], os.fsync

    def noting(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        there = os.path.exists(os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "manifest.json"))
        synced.append((os.path.basename(path), os.path.getsize(path), there))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    store = write_store(tmp_path / "store", DOCUMENTS, tokenizer, shard_tokens=5)
    for shard in store.manifest.shards:
        for suffix, size in ((".bin", shard.bin_bytes), (".idx", shard.idx_bytes)):
            assert (shard.name + suffix, size, False) in synced  # whole, and before there is a manifest
    assert len(store.manifest.shards) == 2
    names = [name for name, _, _ in synced]
    assert names.index("tokenizer.json") < names.index("manifest.json")
    assert names[-1] == tmp_path.name  # the folder that holds the new name


KILLED = """
import os, sys
from kdtrain.data.token_store import TokenStoreWriter
left, calls = int(sys.argv[3]), ("fsync", "rename")
def dying(call):
    def wrapped(*args):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return call(*args)
    return wrapped
for name in calls:
    setattr(os, name, dying(getattr(os, name)))
with TokenStoreWriter(sys.argv[1], sys.argv[2], 0, source="x") as writer:
    writer.add([1, 2, 3], 3)
    writer.commit()
"""


def test_writer_killed_at_any_step_leaves_complete_store_or_none(tmp_path, tokenizer):
    seen = []
    for survived in (0, 1, 2, 5, 6, 7, 99):
        folder = tmp_path / str(survived) / "store"
        words = [sys.executable, "-c", KILLED, str(folder), str(tokenizer), str(survived)]
        code = subprocess.run(words, check=False, timeout=60).returncode
        if folder.exists():
            TokenStore.open(folder).verify()
        seen.append((code, folder.exists()))
    assert seen[0] == (9, False)
    assert seen[-1] == (0, True)
    assert (9, True) in seen  # killed between the rename and the end
