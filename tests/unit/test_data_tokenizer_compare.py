"""Two tokenizers: equal, equal except for some added tokens, or with another vocabulary."""

import json

import pytest

from kdtrain.data.tokenizer import load_tokenizer
from kdtrain.data.tokenizer_compare import Comparison, compare_tokenizers
from tests.support.tiny_data import write_tokenizer


def edit(folder, change):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_same_tokenizer_in_other_formatting_is_equal(tmp_path):
    a, b = write_tokenizer(tmp_path / "a"), write_tokenizer(tmp_path / "b")
    cut = {"max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    edit(b, lambda t: t.update(truncation=cut))
    assert compare_tokenizers(a, b) == Comparison(None, {})


def test_a_difference_names_the_first_probe_with_both_lists_of_ids(tmp_path):
    a, b = write_tokenizer(tmp_path / "a"), write_tokenizer(tmp_path / "b", lowercase=True)
    found = compare_tokenizers(a, b).difference
    ids_a, ids_b = (load_tokenizer(f).encode("Hello world").ids for f in (a, b))
    assert ids_a[0] != ids_b[0]
    assert found.startswith(f"'Hello world' is [{ids_a[0]}, ")
    assert f"[{ids_b[0]}, " in found


def test_a_difference_far_into_a_probe_is_shown_and_not_cut_off(tmp_path):
    a = write_tokenizer(tmp_path / "a")
    b = edit(write_tokenizer(tmp_path / "b"), lambda t: t.update(normalizer={"type": "NFC"}))
    assert compare_tokenizers(a, b) == Comparison(None, {})  # other rules, same ids on every probe
    c = edit(write_tokenizer(tmp_path / "c"), lambda t: t["model"]["vocab"].update({"d": 300}))
    found = compare_tokenizers(a, c).difference
    shown_a, shown_c = found.split(" is ")[1].split(" in ")[0], found.split(" and ")[1].split(" in ")[0]
    assert shown_a != shown_c
    assert "300" in shown_c


def test_unshared_trained_token_is_a_difference(tmp_path):
    a = write_tokenizer(tmp_path / "a")
    b = edit(write_tokenizer(tmp_path / "b"), lambda t: t["model"]["vocab"].update({"\u0120\u0120\u0120": 257}))
    assert compare_tokenizers(a, b).difference == "token '\u0120\u0120\u0120' with id 257 is in only one of them"
    c = edit(write_tokenizer(tmp_path / "c"), lambda t: t["model"]["vocab"].update({"\u0120\u0120": 257}))
    assert "id 257 is '\u0120\u0120\u0120' in " in compare_tokenizers(b, c).difference


@pytest.mark.parametrize("swapped", [False, True])
def test_added_tokens_that_only_one_has_leave_the_other_ids_shared(tmp_path, swapped):
    few, many = write_tokenizer(tmp_path / "few", more=["<a>"]), write_tokenizer(tmp_path / "many", more=["<a>", "<t>"])
    found = compare_tokenizers(*((many, few) if swapped else (few, many)))
    assert found == Comparison(None, {258: ("<t>", None) if swapped else (None, "<t>")})


def test_an_added_token_with_another_name_is_not_shared(tmp_path):
    a = write_tokenizer(tmp_path / "a", more=["<reserved>", "<x>"])
    b = write_tokenizer(tmp_path / "b", more=["<tool>", "<x>"])
    assert compare_tokenizers(a, b) == Comparison(None, {257: ("<reserved>", "<tool>")})


def test_missing_token_of_special_probe_is_not_a_difference(tmp_path):
    a, b = write_tokenizer(tmp_path / "a"), write_tokenizer(tmp_path / "b", more=["<|im_start|>"])
    assert compare_tokenizers(a, b) == Comparison(None, {257: (None, "<|im_start|>")})


def test_an_added_token_that_changes_ordinary_text_is_a_difference(tmp_path):
    a, b = write_tokenizer(tmp_path / "a"), write_tokenizer(tmp_path / "b", more=["  "])
    assert "two spaces" in compare_tokenizers(a, b).difference
