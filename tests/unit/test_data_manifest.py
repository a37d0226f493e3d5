"""manifest.json: a changed field is refused by name when the store is opened or verified."""

import json

import pytest

from kdtrain.data.manifest import shards_fingerprint
from kdtrain.data.token_store import TokenStore
from kdtrain.errors import DataError
from tests.support.tiny_data import random_documents, write_store, write_tokenizer

ZEROS = "0" * 64


@pytest.fixture
def store(tmp_path):
    """Three shards of vocabulary 257, separator 0."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    store = write_store(tmp_path / "store", random_documents(6, seed=1), tokenizer, shard_tokens=40)
    assert len(store.manifest.shards) == 3
    return store


def change(store, edit):
    file = store.path / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))


def refused(store, *, when="open"):
    look = TokenStore.open(store.path).verify if when == "verify" else lambda: TokenStore.open(store.path)
    with pytest.raises(DataError) as caught:
        look()
    message = str(caught.value)
    assert "manifest.json" in message
    assert "\n  fix: " in message
    return message


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("vocab_size", "257", "must be a whole number in [1, 2147483648)"),
        ("vocab_size", 0, "must be a whole number"),
        ("vocab_size", True, "must be a whole number"),
        ("vocab_size", 1_000_000, "does not fit dtype 'uint16'"),
        ("separator_id", "x", "must be a whole number in [0, 257)"),
        ("separator_id", 257, "must be a whole number in [0, 257)"),
        ("separator_id", -1, "must be a whole number in [0, 257)"),
        ("separator_id", False, "must be a whole number in [0, 257)"),
        ("text_bytes", -5, "must be a whole number of at least 0"),
        ("text_bytes", None, "must be a whole number of at least 0"),
        ("num_tokens", 145.0, "must be a whole number of at least 1"),
        ("num_documents", "6", "must be a whole number of at least 1"),
        ("fingerprint", "deadbeef", "must be a sha256"),
        ("fingerprint", 5, "must be a sha256"),
        ("fingerprint", ZEROS, "that of its shards in their order is"),
        ("tokenizer_fingerprint", ["a"], "must be a sha256"),
        ("source", 5, "must be a text"),
        ("dtype", ["uint16"], "must be one of"),
        ("dtype", "int32", "does not fit dtype 'int32'"),
    ],
)
def test_a_field_of_the_wrong_type_or_range_is_refused_at_opening_by_name(store, name, value, why):
    change(store, lambda m: m.update({name: value}))
    message = refused(store)
    assert name in message
    assert why in message


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("name", "shard_00002", "name is 'shard_00002', must be 'shard_00001'"),
        ("name", "../store/shard_00001", "must be 'shard_00001'"),
        ("num_tokens", 40.0, "num_tokens is 40.0"),
        ("num_documents", 0, "num_documents is 0"),
        ("bin_bytes", 7, "bin_bytes is 7"),
        ("idx_bytes", "7", "idx_bytes is '7'"),
        ("bin_sha256", "x", "bin_sha256 is 'x'"),
        ("idx_sha256", None, "idx_sha256 is None"),
        ("bin_sha256", ZEROS, "fingerprint is"),
    ],
)
def test_an_entry_of_a_shard_that_was_changed_is_refused_at_opening(store, name, value, why):
    change(store, lambda m: m["shards"][1].update({name: value}))
    message = refused(store)
    assert why in message
    if value != ZEROS:
        assert "shards[1]" in message


def test_shards_in_another_order_have_another_fingerprint_and_are_refused_with_the_old_one(store):
    shards = store.manifest.shards
    assert shards_fingerprint(shards) == store.manifest.fingerprint
    assert shards_fingerprint(shards[::-1]) != store.manifest.fingerprint

    def reverse(manifest):
        """Rename the files too, so that only the fingerprint differs."""
        names = [shard["name"] for shard in manifest["shards"]]
        for suffix in (".bin", ".idx"):
            content = [(store.path / (name + suffix)).read_bytes() for name in names]
            for name, data in zip(names, reversed(content), strict=True):
                (store.path / (name + suffix)).write_bytes(data)
        manifest["shards"] = [s | {"name": n} for s, n in zip(manifest["shards"][::-1], names, strict=True)]

    change(store, reverse)
    assert "fingerprint" in refused(store)


def test_a_separator_that_does_not_end_the_documents_is_refused_at_opening(store):
    change(store, lambda m: m.update(separator_id=3))
    assert "does not end with separator_id 3" in refused(store)


def test_verify_checks_end_of_every_document(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    store = write_store(tmp_path / "store", [[5, 6], [7], [8, 9, 3]], tokenizer)
    store.verify()
    data = bytearray((store.path / "shard_00000.bin").read_bytes())
    data[2 * 4] = 3  # the separator of document 1: tokens 5 6 0 7 0 ...
    (store.path / "shard_00000.bin").write_bytes(data)

    def sign_again(manifest):
        import hashlib

        manifest["shards"][0]["bin_sha256"] = hashlib.sha256(data).hexdigest()
        sums = "".join(s["bin_sha256"] + s["idx_sha256"] for s in manifest["shards"])
        manifest["fingerprint"] = hashlib.sha256(sums.encode()).hexdigest()

    change(store, sign_again)
    TokenStore.open(store.path)
    assert "its document 1 does not end with separator_id 0" in refused(store, when="verify")


@pytest.mark.parametrize("size", [10, 256, 258])
def test_verify_compares_the_size_of_the_vocabulary_with_the_stored_tokenizer(store, size):
    change(store, lambda m: m.update(vocab_size=size))
    message = refused(store, when="verify")
    assert f"vocab_size is {size}" in message
    assert "is 257" in message


def test_a_number_too_long_for_python_is_damage_too(store):
    file = store.path / "manifest.json"
    file.write_text(file.read_text().replace('"text_bytes": ', '"text_bytes": ' + "9" * 5000))
    assert "is damaged" in refused(store)
