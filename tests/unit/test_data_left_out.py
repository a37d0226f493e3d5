"""Texts left out are counted by reason, logged at the end and recorded in the manifest."""

import json
import lzma
import os
from collections import Counter
from pathlib import Path

import pytest

from kdtrain.config.cli import run_script
from kdtrain.data.prepare import PrepareSettings, prepare_corpus
from kdtrain.data.text import read_documents
from kdtrain.data.token_store import TokenStore
from kdtrain.data.tokenizer import load_tokenizer
from kdtrain.errors import EXIT_DATA, EXIT_DONE, DataError
from kdtrain.testing.ranks import load_file
from tests.support.tiny_data import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
INVALID = [
    (b'{"text": null}', "lines whose 'text' is null", "no text under 'text': its value is null"),
    (b'{"text": 3}', "lines whose 'text' is a number", "no text under 'text': its value is 3"),
    (b'{"text": true}', "lines whose 'text' is true or false", "no text under 'text': its value is true"),
    (b'{"text": ["a"]}', "lines whose 'text' is an array", "no text under 'text': its value is an array"),
    (b'{"text": {"a": 1}}', "lines whose 'text' is an object", "no text under 'text': its value is an object"),
    (b'{"body": "x"}', "lines without 'text'", "no text under 'text' (found ['body'])"),
    (b'["x"]', "lines without 'text'", "no text under 'text' (found [\"x\"], which is not an object)"),
    (b'{"text": "x"', "lines of invalid JSON", "not valid JSON"),
    (b'{"text": "\xe9"}', "documents of invalid UTF-8", "invalid UTF-8 at byte 26"),
    (b'{"text": "\\ud83d"}', "texts with half a surrogate pair", "character 0 is half a surrogate pair"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def texts_of(folder):
    store = TokenStore.open(folder)
    tokenizer = load_tokenizer(store.path / "tokenizer")
    return [tokenizer.decode(store[i][:-1].tolist()) for i in range(len(store))]


@pytest.mark.parametrize(("line", "reason", "message"), INVALID)
def test_a_line_that_cannot_be_read_names_its_value_and_is_skipped_on_request(tmp_path, line, reason, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(DataError) as caught:
        list(read_documents([path]))
    assert message in str(caught.value)
    assert "a.jsonl" in str(caught.value)
    assert "--skip-invalid" in str(caught.value)
    counts = Counter()
    assert list(read_documents([path], skip_invalid=True, left_out=counts)) == ["one", "two"]
    assert counts == {reason: 1}


def test_a_long_value_is_not_shown_whole(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": 10**99}))
    with pytest.raises(DataError, match=r"its value is .{60}\.\.\.\n"):
        list(read_documents([tmp_path / "a.jsonl"]))


def test_text_files_of_white_space_are_counted_and_reported(tmp_path, tokenizer, logged):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(400):
        (corpus / f"{number:03}.txt").write_text("\n" if number % 20 == 0 else f"text {number}")
    (corpus / "nothing.txt").touch()
    made = prepare_corpus([corpus], tokenizer, tmp_path / "out", PrepareSettings(workers=1))["train"]
    assert made.num_documents == 380
    assert "left out: 20 files of only white space, 1 empty files" in logged.text
    assert made.left_out == {"files of only white space": 20, "empty files": 1}
    assert json.loads((tmp_path / "out/train/manifest.json").read_text())["left_out"] == made.left_out
    assert TokenStore.open(tmp_path / "out/train").manifest.left_out == made.left_out


def test_everything_left_out_has_a_reason(tmp_path, tokenizer, capsys):
    script, corpus = load_file(ROOT / "launch/prepare_corpus.py"), tmp_path / "corpus"
    corpus.mkdir()
    lines = [b'{"text": "kept"}', b'{"text": ""}', b'{"text": " \\n"}', b"", *(line for line, _, _ in INVALID)]
    (corpus / "a.jsonl.xz").write_bytes(lzma.compress(b"\n".join(lines)))
    (corpus / "b.txt").write_bytes(b"bad \xff")
    (corpus / "c.json").touch()
    (corpus / "d.ndjson").write_bytes(b"\n \n")
    (corpus / "e.pdf").touch()
    (corpus / "f.PDF").touch()
    os.symlink(tmp_path / "nowhere", corpus / "g.txt")
    words = ["--tokenizer", str(tokenizer), "--workers", "1", str(corpus), "--output"]
    assert run_script(script.main, [*words, str(tmp_path / "strict")]) == EXIT_DATA
    capsys.readouterr()
    assert run_script(script.main, [*words, str(tmp_path / "out"), "--skip-invalid"]) == EXIT_DONE
    message = next(line for line in capsys.readouterr().out.splitlines() if "left out: " in line)
    counts = Counter(reason for _, reason, _ in INVALID)
    counts += Counter({"documents of invalid UTF-8": 1, "empty texts": 1, "texts of only white space": 1})
    counts += Counter({"empty files": 1, "files of only white space": 1})
    assert TokenStore.open(tmp_path / "out/train").manifest.left_out == counts
    counts += Counter({"files (.pdf)": 2, "files (broken links and special files)": 1})
    assert sorted(message.partition("left out: ")[2].split(", ")) == sorted(
        f"{n} {reason}" for reason, n in counts.items()
    )
    assert texts_of(tmp_path / "out/train") == ["kept"]


@pytest.mark.parametrize(
    ("content", "marker", "documents", "counts"),
    [
        (
            b"%%\none\n%%\n%%\n \n%%\ntwo\n%%\n",
            "%%",
            ["one\n", "two\n"],
            {"empty parts": 1, "parts of only white space": 1},
        ),
        (b"one\n\n\n\ntwo\n", "", ["one\n", "two\n"], {}),
        (b"one\n%%\nb\xff\n%%\ntwo\n", "%%", ["one\n", "two\n"], {"documents of invalid UTF-8": 1}),
        (b"", "%%", [], {"empty files": 1}),
        (b"\n\n", "", [], {"files of only white space": 1}),
    ],
)
def test_parts_of_text_files_are_counted_too(tmp_path, content, marker, documents, counts):
    (tmp_path / "a.txt").write_bytes(content)
    found = Counter()
    texts = read_documents([tmp_path / "a.txt"], split_on=marker, skip_invalid=True, left_out=found)
    assert list(texts) == documents
    assert found == counts


def test_without_omissions_nothing_is_logged_or_recorded(tmp_path, tokenizer, logged):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n\n')
    made = prepare_corpus([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", PrepareSettings(workers=1))["train"]
    assert made.left_out == {}
    assert "left out" not in logged.text
    keys = list(json.loads((tmp_path / "out/train/manifest.json").read_text()))
    assert keys[-3:] == ["version", "document_prefix", "added_ids"]
    assert not {"left_out", "linked"} & set(keys)


def test_a_damaged_count_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("text")
    prepare_corpus([tmp_path / "a.txt"], tokenizer, tmp_path / "out", PrepareSettings(workers=1))
    file = tmp_path / "out/train/manifest.json"
    content = json.loads(file.read_text())
    for damage, why in (
        (5, "left_out is 5, must be counts by reason"),
        ({"x": "y"}, r"left_out\['x'\] is 'y', must be"),
    ):
        file.write_text(json.dumps(content | {"left_out": damage}))
        with pytest.raises(DataError, match=why):
            TokenStore.open(file.parent)
