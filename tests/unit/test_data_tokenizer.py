"""Tokenizer folders: identity and size."""

import json

import pytest

from kdtrain.data.tokenizer import fingerprint, load_tokenizer, trained_ids, vocab_size
from kdtrain.errors import ConfigError, DataError
from tests.support.tiny_data import write_tokenizer


def edit(folder, change):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content, indent=3), encoding="utf-8")
    return folder


def test_fingerprint_ignores_formatting_and_settings_without_effect_on_ids(tmp_path):
    a, b = write_tokenizer(tmp_path / "a"), write_tokenizer(tmp_path / "b")
    edit(
        b,
        lambda t: t.update(truncation={"max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
    )
    assert (a / "tokenizer.json").read_bytes() != (b / "tokenizer.json").read_bytes()
    assert fingerprint(a) == fingerprint(b)


def test_the_fingerprint_reads_merges_written_in_either_way(tmp_path):
    a, b = write_tokenizer(tmp_path / "a"), write_tokenizer(tmp_path / "b")
    edit(a, lambda t: t["model"].update(merges=[["a", "b"]]))
    edit(b, lambda t: t["model"].update(merges=["a b"]))
    assert fingerprint(a) == fingerprint(b) != fingerprint(write_tokenizer(tmp_path / "c"))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(normalizer={"type": "Lowercase"}),
        lambda t: t["pre_tokenizer"].update(add_prefix_space=True),
        lambda t: t["added_tokens"][0].update(lstrip=True),
        lambda t: t["model"].update(byte_fallback=True),
    ],
)
def test_fingerprint_changes_with_settings_that_change_ids(tmp_path, change):
    a = write_tokenizer(tmp_path / "a")
    assert fingerprint(a) != fingerprint(edit(write_tokenizer(tmp_path / "b"), change))


def test_size_is_largest_id_plus_one(tmp_path):
    assert vocab_size(write_tokenizer(tmp_path / "a")) == 257
    assert vocab_size(write_tokenizer(tmp_path / "b", more=["<x>", "<y>"])) == 259


def test_trained_ids_leave_out_added_tokens_wherever_they_are(tmp_path):
    assert trained_ids(write_tokenizer(tmp_path / "a", more=["<x>"])) == set(range(1, 257))


def test_truncation_and_padding_of_file_are_ignored(tmp_path):
    plain, kept = write_tokenizer(tmp_path / "plain"), write_tokenizer(tmp_path / "kept")
    cut = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    fill = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    fill |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    edit(kept, lambda t: t.update(truncation=cut, padding=fill))
    texts = ["one", "longer than four"]
    wanted = [e.ids for e in load_tokenizer(plain).encode_batch(texts)]
    assert [len(ids) for ids in wanted] == [3, 16]
    assert [e.ids for e in load_tokenizer(kept).encode_batch(texts)] == wanted


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"model": {"type": "BPE", "vocab": 3}}',
        '{"model": {}}',
        pytest.param(f'{{"model": {"9" * 5000}}}', id="digits"),
        pytest.param("[" * 100_000, id="nesting"),
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json .*\n  fix: "):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        fingerprint(tmp_path)
