"""Several documents in one text file, the separator in the text, tokens outside the vocabulary."""

import os
from pathlib import Path

import numpy as np
import pytest

from kdtrain.config.cli import run_script
from kdtrain.data.packing import PackingSpec, pack
from kdtrain.data.prepare import PrepareSettings, prepare_corpus
from kdtrain.data.text import read_documents
from kdtrain.data.token_store import TokenStore
from kdtrain.data.tokenizer import load_tokenizer
from kdtrain.errors import EXIT_DONE, ConfigError, DataError
from kdtrain.testing.ranks import load_file
from tests.support.tiny_data import SEPARATOR, SEPARATOR_ID, write_store, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("content", "marker", "documents"),
    [
        ("one\ntwo\n%%\nthree\n", "%%", ["one\ntwo\n", "three\n"]),
        ("one\n  %%  \r\n%%\nthree", "%%", ["one\n", "three"]),  # an empty part is left out
        ("one\n%% not a border\n%%%\n", "%%", ["one\n%% not a border\n%%%\n"]),
        ("one\ntwo\n\n \nthree\n", "", ["one\ntwo\n", "three\n"]),
        ("%%\none\n%%", "%%", ["one\n"]),
        ("\ufeff%%\none", "%%", ["one"]),
    ],
)
def test_a_text_file_is_split_at_lines_that_equal_the_marker(tmp_path, content, marker, documents):
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    assert list(read_documents([path], split_on=marker)) == documents
    assert list(read_documents([path])) == [content.removeprefix("\ufeff")]


def test_json_lines_are_not_split(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\n%%\\ntwo"}\n')
    assert list(read_documents([path], split_on="%%")) == ["one\n%%\ntwo"]


def test_invalid_utf8_in_a_later_line_is_placed_in_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n%%\nab\xffc\n")
    with pytest.raises(DataError, match="invalid UTF-8 at byte 9"):
        list(read_documents([path], split_on="%%"))


def test_the_script_splits_on_the_line_it_is_given(tmp_path, tokenizer, capsys):
    script = load_file(ROOT / "launch/prepare_corpus.py")
    (tmp_path / "a.txt").write_text(f"one\n{SEPARATOR}\ntwo\n")
    words = ["--tokenizer", str(tokenizer), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert run_script(script.main, [*words, "--split-on", SEPARATOR, str(tmp_path / "a.txt")]) == EXIT_DONE
    assert "2 documents, 10 tokens" in capsys.readouterr().out


def prepared(tmp_path, tokenizer, name, inner, text, more=("three",)):
    """The documents of a store made of these texts, as text, and its manifest."""
    for number, content in enumerate([text, *more]):
        (tmp_path / f"{number}.txt").write_text(content)
    files = [tmp_path / f"{number}.txt" for number in range(1 + len(more))]
    settings = PrepareSettings(workers=1, inner_separators=inner)
    made = prepare_corpus(files, tokenizer, tmp_path / name, settings)["train"]
    store, decode = TokenStore.open(tmp_path / name / "train"), load_tokenizer(tokenizer).decode
    assert all(store[n][-1] == SEPARATOR_ID for n in range(len(store)))
    return [decode(store[n][:-1].tolist(), skip_special_tokens=False) for n in range(len(store))], made


def test_a_separator_inside_a_text_is_refused_and_cut_or_kept_on_request(tmp_path, tokenizer):
    text = f"one\n{SEPARATOR}\ntwo{SEPARATOR}{SEPARATOR}\u00fc"
    with pytest.raises(DataError, match=r"holds the separator <\|endoftext\|> \(token 0\) inside, 3 times(.|\n)*'one"):
        prepared(tmp_path, tokenizer, "refused", None, text)
    assert not (tmp_path / "refused/train").exists()
    documents, made = prepared(tmp_path, tokenizer, "split", "split", text)
    assert documents == ["one\n", "\ntwo", "\u00fc", "three"]
    assert (made.left_out, made.text_bytes) == ({"texts without tokens": 1}, 4 + 4 + 2 + 5)
    documents, made = prepared(tmp_path, tokenizer, "kept", "keep", text)
    assert (documents, made.left_out) == ([text, "three"], {})
    with pytest.raises(ConfigError, match="inner_separators = 'x' is not known\n  fix: use one of split, keep"):
        prepared(tmp_path, tokenizer, "unknown", "x", text)


def test_separator_at_end_of_text_is_not_repeated(tmp_path, tokenizer):
    documents, made = prepared(tmp_path, tokenizer, "out", None, f"one{SEPARATOR}")
    assert (documents, made.num_tokens, made.text_bytes) == (["one", "three"], 4 + 6, 3 + 5)


def test_a_text_without_tokens_is_left_out_and_counted(tmp_path, tokenizer):
    documents, made = prepared(tmp_path, tokenizer, "out", None, SEPARATOR)
    assert (documents, made.left_out) == (["three"], {"texts without tokens": 1})


def test_train_store_appears_after_validation_store(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(40)))
    there = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (rename(a, b), there.append(Path(b).name)))
    made = prepare_corpus(
        [tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", PrepareSettings(validation_share=0.5, workers=1)
    )
    assert there == ["validation", "train"]
    assert list(made) == ["train", "validation"]


def test_ids_are_those_of_the_tokenizer_one_text_at_a_time(tmp_path, tokenizer):
    texts = ["a b", "\u6771\u4eac na\u00efve \U0001f642", f"x{SEPARATOR}y", "  two  spaces\t"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    settings = PrepareSettings(workers=1, inner_separators="keep")
    prepare_corpus(sorted(tmp_path.glob("*.txt")), tokenizer, tmp_path / "out", settings)
    store, encode = TokenStore.open(tmp_path / "out/train"), load_tokenizer(tokenizer).encode
    for number, text in enumerate(texts):
        assert store[number].tolist() == [*encode(text, add_special_tokens=False).ids, SEPARATOR_ID]


def test_create_gives_the_writer_of_a_store(tmp_path, tokenizer):
    with TokenStore.create(tmp_path / "store", tokenizer, SEPARATOR_ID, source="by hand") as writer:
        writer.add([7, 8], text_bytes=2)
        writer.commit()
    store = TokenStore.open(tmp_path / "store")
    assert store[0].tolist() == [7, 8, SEPARATOR_ID]
    assert store.manifest.source == "by hand"


def test_token_outside_vocabulary_is_refused_when_packed(tmp_path, tokenizer):
    store = write_store(tmp_path / "store", [[5, 6, 7, 8], [9, 10]], tokenizer)
    data = np.fromfile(store.path / "shard_00000.bin", dtype=np.uint16)
    data[5] = 40000
    data.tofile(store.path / "shard_00000.bin")
    damaged = TokenStore.open(tmp_path / "store")
    assert pack(damaged, 0, PackingSpec(3))[0].tolist() == [5, 6, 7]
    with pytest.raises(DataError, match=r"store is damaged: token 5 is 40000, not in \[0, 257\)"):
        pack(damaged, 1, PackingSpec(3))
