"""Megatron pairs used in place: the same store except for a link, refused where a token would have to change."""

import json
import os
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors

from kdtrain.config.cli import run_script
from kdtrain.data import import_megatron as importing
from kdtrain.data.import_megatron import MegatronSettings, import_megatron
from kdtrain.data.loader import StepLoader, StepShape
from kdtrain.data.megatron_index import read_index
from kdtrain.data.packing import PackingSpec
from kdtrain.data.token_store import TokenStore
from kdtrain.data.tokenizer import load_tokenizer
from kdtrain.errors import EXIT_DATA, EXIT_DONE, DataError
from kdtrain.stores.keys import NUMBER_BITS
from kdtrain.testing.ranks import load_file
from tests.support.tiny_data import random_documents, write_pair, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BOS = 257
FINISHED = [[*ids, 0] for ids in random_documents(60, seed=2)]
IN_PLACE = MegatronSettings(in_place=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), more=["<bos>"])


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("with_bos"), more=["<bos>"])
    tokenizer = load_tokenizer(folder)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def both(tmp_path, prefixes, tokenizer, **settings):
    """The stores of a copy and in place."""
    for name in ("copy", "place"):
        chosen = MegatronSettings(in_place=name == "place", **settings)
        import_megatron(prefixes, tokenizer, tmp_path / name, chosen)
    return tuple(TokenStore.open(tmp_path / name / "train") for name in ("copy", "place"))


def test_store_in_place_equals_copied_store_except_for_link(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(importing, "BLOCK_TOKENS", 100)
    pair = write_pair(tmp_path / "pair", FINISHED)
    copy, place = both(tmp_path, [pair], tokenizer)
    linked = place.path / "shard_00000.bin"
    assert os.readlink(linked) == str(tmp_path / "pair.bin")
    assert not (copy.path / "shard_00000.bin").is_symlink()
    contents = [json.loads((store.path / "manifest.json").read_text()) for store in (copy, place)]
    mtime = (tmp_path / "pair.bin").stat().st_mtime_ns
    entry = {"shard": "shard_00000", "path": str(tmp_path / "pair.bin"), "mtime_ns": mtime}
    assert contents[1].pop("linked") == [entry]
    assert contents[0] == contents[1]
    for file in ("shard_00000.bin", "shard_00000.idx", "tokenizer/tokenizer.json"):
        assert (copy.path / file).read_bytes() == (place.path / file).read_bytes()
    place.verify()


def test_training_on_a_store_in_place_draws_the_same_batches(tmp_path, tokenizer):
    pairs = [write_pair(tmp_path / name, FINISHED[cut]) for name, cut in (("a", slice(0, 25)), ("b", slice(25, 60)))]
    copy, place = both(tmp_path, pairs, tokenizer)
    assert len(place.manifest.shards) == 2
    how = {"packing": PackingSpec(16), "shape": StepShape(4, 2), "prefetch": 0}
    for _, mine, other in zip(range(40), StepLoader([copy], **how), StepLoader([place], **how), strict=False):
        for a, b in zip(mine, other, strict=True):
            for name in ("input_ids", "labels", "loss_mask", "position_ids"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
            # other shards are another store, so its keys differ, but not the numbers of its sequences
            assert torch.equal(a.sample_ids & ((1 << NUMBER_BITS) - 1), b.sample_ids & ((1 << NUMBER_BITS) - 1))


def test_a_store_in_place_is_a_pair_that_megatron_reads(tmp_path, tokenizer):
    pair = write_pair(tmp_path / "pair", FINISHED)
    import_megatron([pair], tokenizer, tmp_path / "out", IN_PLACE)
    train = tmp_path / "out/train"
    assert (train / "shard_00000.idx").read_bytes() == (tmp_path / "pair.idx").read_bytes()
    again = import_megatron([train / "shard_00000"], tokenizer, tmp_path / "again", IN_PLACE)["train"]
    assert again.fingerprint == TokenStore.open(train).manifest.fingerprint
    assert os.readlink(tmp_path / "again/train/shard_00000.bin") == str(tmp_path / "pair.bin")


@pytest.mark.parametrize(
    ("settings", "index"),
    [
        ({"documents_from": "stream"}, [0]),
        ({"documents_from": "stream"}, None),
        ({"documents_from": "index", "inner_separators": "split"}, [0, 3]),
    ],
)
def test_cut_or_joined_documents_need_only_a_new_index(tmp_path, tokenizer, settings, index):
    pair = write_pair(tmp_path / "pair", [[5, 6, 0, 7], [8, 9, 0, 10], [11, 0]], index)
    copy, place = both(tmp_path, [pair], tokenizer, **settings)
    assert [place[i].tolist() for i in range(len(place))] == [[5, 6, 0], [7, 8, 9, 0], [10, 11, 0]]
    assert place.manifest.fingerprint == copy.manifest.fingerprint
    assert read_index(place.path / "shard_00000.idx").sizes.tolist() == [3, 4, 3]
    place.verify()


def test_existing_prefix_is_kept_and_not_counted_as_text(tmp_path, with_bos):
    pair = write_pair(tmp_path / "pair", [[BOS, *document] for document in FINISHED])
    copy, place = both(tmp_path, [pair], with_bos)
    assert place.manifest.document_prefix == (BOS,)
    assert place.manifest.text_bytes == copy.manifest.text_bytes
    import_module("bench_import").naive(pair, with_bos, tmp_path / "naive")
    assert place.manifest.text_bytes == TokenStore.open(tmp_path / "naive/train").manifest.text_bytes


@pytest.mark.parametrize(
    ("documents", "dtype", "choice", "why"),
    [
        (
            [[5, 6, 0], [7, 8]],
            "uint16",
            "index",
            "1 of 2 documents do not end with the separator (token 0)",
        ),
        ([[5, 6, 0], [7, 0]], "int32", None, "its tokens are int32, a store of this vocabulary holds uint16"),
        ([[5, 6, 0], [0], [7, 0, 0]], "uint16", "stream", "2 documents hold nothing but a separator"),
        ([[5, 6, 0], [300, 0]], "uint16", None, "token 3 is 300, not in [0, 258), the tokenizer's vocabulary"),
    ],
)
def test_a_pair_that_needs_a_change_is_not_used_in_place(tmp_path, tokenizer, documents, dtype, choice, why):
    pair = write_pair(tmp_path / "pair", documents, dtype=dtype)
    with pytest.raises(DataError) as caught:
        import_megatron([pair], tokenizer, tmp_path / "out", MegatronSettings(documents_from=choice, in_place=True))
    assert why in str(caught.value)
    assert str(tmp_path / "pair.bin") in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_documents_without_the_prefix_are_not_used_in_place_unless_it_is_left_out(tmp_path, with_bos):
    pair = write_pair(tmp_path / "pair", [[BOS, 5, 0], [6, 0], [7, 0]])
    with pytest.raises(DataError, match=r"2 of 3 documents do not begin with the prefix \(tokens \[257\]; --bos never"):
        import_megatron([pair], with_bos, tmp_path / "out", IN_PLACE)
    import_megatron([pair], with_bos, tmp_path / "out", MegatronSettings(bos="never", in_place=True))
    assert TokenStore.open(tmp_path / "out/train")[0].tolist() == [BOS, 5, 0]


@pytest.fixture
def used(tmp_path, tokenizer):
    """A pair's .bin and the store that uses it."""
    pair = write_pair(tmp_path / "pair", FINISHED)
    import_megatron([pair], tokenizer, tmp_path / "out", IN_PLACE)
    return tmp_path / "pair.bin", tmp_path / "out/train"


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda file: file.unlink(), r"is missing"),
        (lambda file: file.rename(file.with_name("moved.bin")), r"is missing"),
        (lambda file: os.truncate(file, 10), r"is truncated: 10 bytes, \d+ in the manifest"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0\0"), r"is damaged: \d+ bytes, \d+ in the manifest"),
        (flip, r"was changed after the store was made: last modified \d{4}-.*, then \d{4}-"),
    ],
)
def test_missing_or_changed_pair_is_refused_by_name(used, change, why):
    file, store = used
    before = file.stat().st_mtime_ns
    change(file)
    if file.exists():
        os.utime(file, ns=(before + 10**9, before + 10**9))
    with pytest.raises(DataError, match=rf"^{file} \(used in place as {store}/shard_00000\.bin\) {why}") as caught:
        TokenStore.open(store)
    assert "fix: restore the pair with its date (cp -p, rsync -t), or make the store again" in str(caught.value)


@pytest.mark.parametrize("unit", [100, 1000, 10**6, 10**9])
def test_rounded_modification_time_is_accepted(used, unit):
    file, store = used
    recorded = TokenStore.open(store).manifest.linked[0].mtime_ns
    os.utime(file, ns=(recorded, recorded // unit * unit))
    TokenStore.open(store)
    os.utime(file, ns=(recorded, recorded // unit * unit - 1))
    with pytest.raises(DataError, match="was changed after the store was made"):
        TokenStore.open(store)


def test_verify_finds_changed_bit_with_unchanged_time(used):
    file, store = used
    before = file.stat().st_mtime_ns
    flip(file)
    os.utime(file, ns=(before, before))
    with pytest.raises(DataError, match=rf"^{file} \(used in place as .*\) is damaged: sha256"):
        TokenStore.open(store).verify()


def test_copy_that_follows_link_does_not_need_pair(used, tmp_path):
    file, store = used
    shutil.copytree(store, tmp_path / "whole")
    file.unlink()
    copied = TokenStore.open(tmp_path / "whole")
    copied.verify()
    assert copied.tokens(0, copied.num_tokens).tolist() == np.concatenate(FINISHED).tolist()


def test_script_uses_pair_in_place_and_names_faults(tmp_path, tokenizer, capsys):
    script = load_file(ROOT / "launch/prepare_corpus.py")
    pair = write_pair(tmp_path / "pair", FINISHED)
    base = ["--tokenizer", str(tokenizer), "--from-megatron", "--in-place"]
    assert run_script(script.main, [*base, "--output", str(tmp_path / "out"), str(pair)]) == EXIT_DONE
    assert f"{len(FINISHED)} documents, {sum(map(len, FINISHED)):,} tokens" in capsys.readouterr().out
    assert (tmp_path / "out/train/shard_00000.bin").is_symlink()
    manifest = tmp_path / "out/train/manifest.json"
    content = json.loads(manifest.read_text())
    for entry, why in (
        ({"shard": "shard_00001"}, "linked names the shard 'shard_00001', which does not exist"),
        ({"shard": []}, "linked names the shard"),
        ({"mtime_ns": -1}, "mtime_ns of 'shard_00000' is -1"),
    ):
        manifest.write_text(json.dumps(content | {"linked": [content["linked"][0] | entry]}))
        with pytest.raises(DataError, match=why):
            TokenStore.open(manifest.parent)
    pair = write_pair(tmp_path / "bad", FINISHED, dtype="int32")
    assert run_script(script.main, [*base, "--output", str(tmp_path / "bad_out"), str(pair)]) == EXIT_DATA
    assert "fix: leave out --in-place" in capsys.readouterr().err
