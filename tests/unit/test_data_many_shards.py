"""A store of trillions of tokens has thousands of shards; a process may open a thousand files."""

import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from kdtrain.data import shards, token_store
from kdtrain.data.token_store import TokenStore, TokenStoreWriter

SHARDS = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Document i is i, i + 1, i + 2 modulo 50 and the separator; one document per shard."""
    root = tmp_path_factory.mktemp("many")
    Tokenizer(models.WordLevel({str(i): i for i in range(51)}, unk_token="0")).save(str(root / "tokenizer.json"))
    with TokenStoreWriter(root / "store", root, 50, source="numbers", shard_tokens=4) as writer:
        for i in range(SHARDS):
            writer.add([(i + j) % 50 for j in range(3)], text_bytes=3)
        writer.commit()
    return root / "store"


def test_more_shards_than_a_process_may_open_files_are_read(folder):
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from kdtrain.data import shards, token_store\n"
        "token_store.MAPPED_SHARDS = 8\n"
        "store = token_store.TokenStore.open(sys.argv[1])\n"
        "store.verify()\n"
        "print(len(store), *store.tokens(0, store.num_tokens))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    count, *tokens = map(int, done.stdout.split())
    assert count == SHARDS
    assert tokens == [t for i in range(SHARDS) for t in (i % 50, (i + 1) % 50, (i + 2) % 50, 50)]


def test_the_default_number_of_mapped_shards_fits_the_usual_limit_of_files():
    stores, files_per_shard, usual_limit = 3, 2, 1024
    assert stores * files_per_shard * token_store.MAPPED_SHARDS < usual_limit


def test_read_maps_only_needed_shards(folder, monkeypatch):
    store = TokenStore.open(folder)
    mapped = []
    original = token_store.map_shard
    monkeypatch.setattr(
        store, "_shard", lambda number: mapped.append(number) or original(folder, store.manifest, number)
    )
    assert store.tokens(401, 407).tolist() == [1, 2, 50, 1, 2, 3]
    assert store.document_starts(399, 409).tolist() == [400, 404, 408]
    assert store[149].tolist() == [49, 0, 1, 50]
    assert mapped == [100, 101, 99, 100, 101, 102, 149]


def test_views_of_a_shard_outlive_its_mapping(folder, monkeypatch):
    monkeypatch.setattr(token_store, "MAPPED_SHARDS", 2)
    store = TokenStore.open(folder)
    views = [store[i] for i in range(SHARDS)]
    assert np.concatenate(views).tolist() == store.tokens(0, store.num_tokens).tolist()


def test_open_checks_bounded_number_of_index_entries(folder, monkeypatch):
    looked = []
    monkeypatch.setattr(shards.MegatronIndex, "check", lambda self, path, *, probes: looked.append(probes))
    TokenStore.open(folder)
    assert len(looked) == SHARDS
    assert sum(looked) <= shards.INDEX_PROBES
