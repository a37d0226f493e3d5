"""From text files to stores: what is read, what is refused, and independence of the number of workers."""

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from kdtrain.config.cli import run_script
from kdtrain.data import prepare
from kdtrain.data.import_megatron import import_megatron
from kdtrain.data.megatron_index import index_bytes
from kdtrain.data.prepare import PrepareSettings, is_validation, prepare_corpus
from kdtrain.data.text import find_files, read_documents
from kdtrain.data.token_store import TokenStore
from kdtrain.data.tokenizer import load_tokenizer
from kdtrain.errors import EXIT_CONFIG, EXIT_DATA, EXIT_DONE, ConfigError, DataError
from kdtrain.testing.ranks import load_file
from tests.support.tiny_data import random_documents, write_store, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SERIAL = PrepareSettings(workers=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def script():
    return load_file(ROOT / "launch/prepare_corpus.py")


def json_lines(*texts, key="text"):
    return "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def texts_of(store):
    tokenizer = load_tokenizer(store.path / "tokenizer")
    return [tokenizer.decode(store[i][:-1].tolist()) for i in range(len(store))]


def test_text_and_json_lines_plain_and_compressed_become_documents_in_order(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one file,\ntwo lines: naïve 🙂\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes(json_lines("first", "second\nline") + b"\n")
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(json_lines("packed")))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    made = prepare_corpus([tmp_path], tokenizer, tmp_path / "out", SERIAL)
    store = TokenStore.open(tmp_path / "out/train")
    wanted = ["one file,\ntwo lines: naïve 🙂\n", "first", "second\nline", "packed", "zipped"]
    assert texts_of(store) == wanted
    size = sum(len(text.encode()) for text in wanted)
    assert (made["train"].text_bytes, store.num_tokens) == (size, size + 5)  # one token per byte, one separator each
    assert store.tokens(0, store.num_tokens).tolist().count(0) == 5
    assert list(made) == ["train"]
    assert "a.txt, b.jsonl" in made["train"].source


def test_files_are_found_by_name_folder_and_pattern_each_once(tmp_path):
    for name in ("x/b.txt", "x/a.txt", "x/y/c.jsonl.gz", "x/y/skip.py", "x/tar.tar.xz", "odd.name"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(*inputs):
        return [str(p.relative_to(tmp_path)) for p in find_files([tmp_path / i for i in inputs])]

    assert found("x") == ["x/a.txt", "x/b.txt", "x/y/c.jsonl.gz"]
    assert found("x/b.txt", "x", "odd.name") == ["x/b.txt", "x/a.txt", "x/y/c.jsonl.gz", "odd.name"]
    assert found("x/*.txt") == ["x/a.txt", "x/b.txt"]
    assert found("**/*.gz") == ["x/y/c.jsonl.gz"]
    (tmp_path / "empty").mkdir()
    for missing, why in (("nope.txt", "does not exist"), ("*.nope", "does not exist"), ("empty", "holds no text file")):
        with pytest.raises(ConfigError, match=why):
            find_files([tmp_path / "x", tmp_path / missing])


def test_byte_order_mark_is_removed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines("x"))
    assert list(read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])) == ["hello", "x"]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.txt", b"good \xff bad", "a.txt: invalid UTF-8 at byte 5 (ff 20 62 61)"),
        ("a.txt", b"\xef\xbb\xbfgood \xc3(", "a.txt: invalid UTF-8 at byte 8 (c3 28)"),
        ("a.txt", b"cut \xf0\x9f\x99", "a.txt: invalid UTF-8 at byte 4"),
        ("a.jsonl", json_lines("ok") + b'{"text": "\xe9"}\n', "a.jsonl: invalid UTF-8 at byte 25 (e9 22 7d 0a)"),
        ("a.jsonl", json_lines("ok", "ok") + b'{"text": "x"\n', "a.jsonl:3: not valid JSON"),
        (
            "a.jsonl",
            json_lines("ok") + b"\n" + json_lines("x", key="body"),
            "a.jsonl:3: no text under 'text' (found ['body'])",
        ),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1: no text under 'text' (found [\"text\"], which is not an object)"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: no text under 'text'"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n", "a.jsonl:1: not valid JSON: Exceeds the limit"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "a.jsonl:1: not valid JSON"),
        ("a.jsonl", b'{"text": "half \\ud83d"}\n', "a.jsonl:1: character 5 is half a surrogate pair"),
        ("a.jsonl.xz", lzma.compress(json_lines("ok"))[:-9], "a.jsonl.xz: cannot be read"),
        ("a.jsonl.xz", b"not an archive", "a.jsonl.xz: cannot be read"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-4], "a.txt.gz: cannot be read"),
        ("a.txt", b" \n", "no documents"),
        ("a.jsonl", b"", "no documents"),
    ],
)
def test_bad_input_exits_with_code_3_place_and_fix_and_writes_nothing(
    tmp_path, tokenizer, script, capsys, name, content, where
):
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    words = ["--tokenizer", str(tokenizer), "--output", str(out), "--workers", "1", str(tmp_path / name)]
    assert run_script(script.main, words) == EXIT_DATA
    message = capsys.readouterr().err
    assert where in message
    assert "fix:" in message
    assert list(out.iterdir()) == []


def test_byte_order_mark_is_removed_only_at_file_start(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeff\ufeffone\n\ufefftwo\n%%\n\ufeffthree", encoding="utf-8")
    assert list(read_documents([tmp_path / "a.txt"])) == ["\ufeffone\n\ufefftwo\n%%\n\ufeffthree"]
    assert list(read_documents([tmp_path / "a.txt"], split_on="%%")) == ["\ufeffone\n\ufefftwo\n", "\ufeffthree"]
    (tmp_path / "b.jsonl").write_bytes(json_lines("x") + b"\xef\xbb\xbf" + json_lines("y"))
    with pytest.raises(DataError, match=r"b\.jsonl:2: not valid JSON"):
        list(read_documents([tmp_path / "b.jsonl"]))


def test_invalid_characters_are_replaced_on_request(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "half \\ud83d, whole \\ud83d\\ude42"}\n')
    prepare_corpus([tmp_path], tokenizer, tmp_path / "out", PrepareSettings(errors="replace", workers=1))
    assert texts_of(TokenStore.open(tmp_path / "out/train")) == ["good \ufffd bad", "half \ufffd, whole 🙂"]


def test_wrong_requests_end_with_code_2(tmp_path, tokenizer, script, capsys):
    (tmp_path / "a.txt").write_text("text")
    base = ["--output", str(tmp_path / "out"), "--workers", "1"]
    for words, why in (
        (["--tokenizer", str(tmp_path), str(tmp_path / "a.txt")], "tokenizer.json does not exist"),
        (["--tokenizer", str(tokenizer), str(tmp_path / "b.txt")], "b.txt does not exist"),
        (["--tokenizer", str(tokenizer), "--separator", "<no>", str(tmp_path / "a.txt")], "tried '<no>'"),
    ):
        assert run_script(script.main, base + words) == EXIT_CONFIG
        assert why in capsys.readouterr().err
    for words in (["--validation-share", "1"], ["--workers", "0"], ["--from-megatron", "--validation-share", "0.1"]):
        with pytest.raises(SystemExit) as caught:
            run_script(script.main, ["--tokenizer", str(tokenizer), *base, *words, "x"])
        assert caught.value.code == EXIT_CONFIG
    capsys.readouterr()
    for words in (["--field", "text"], ["--errors", "strict"], ["--split-on", ""], ["--workers", "1"]):
        with pytest.raises(SystemExit) as caught:
            run_script(script.main, ["--tokenizer", str(tokenizer), *base[:2], "--from-megatron", *words, "x"])
        assert caught.value.code == EXIT_CONFIG
        assert f"--from-megatron cannot be used with {words[0]}: " in capsys.readouterr().err
    done = ["--tokenizer", str(tokenizer), str(tmp_path / "a.txt")]
    assert run_script(script.main, base + done) == EXIT_DONE
    assert "1 documents, 5 tokens" in capsys.readouterr().out
    assert run_script(script.main, base + done) == EXIT_CONFIG  # never overwrites
    assert "exists already" in capsys.readouterr().err


def test_the_stores_do_not_depend_on_the_number_of_workers(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_DOCUMENTS", 3)
    texts = ["".join(map(chr, ids)) for ids in random_documents(50, seed=5)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(*texts))
    for workers in (1, 2):
        settings = PrepareSettings(validation_share=0.3, workers=workers)
        prepare_corpus([tmp_path / "a.jsonl"], tokenizer, tmp_path / str(workers), settings)
    files = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*") if p.is_file())
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file
    kept = [t for t in texts if t.strip()]
    train, held = (texts_of(TokenStore.open(tmp_path / "2" / n)) for n in ("train", "validation"))
    assert train == [t for t in kept if not is_validation(t, 0.3)]
    assert held == [t for t in kept if is_validation(t, 0.3)]
    assert train
    assert held


def test_bad_input_after_many_documents_stops_workers(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(json_lines(*["text"] * 1000) + b"{\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1001"):
        prepare_corpus([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", PrepareSettings(workers=2))
    assert list((tmp_path / "out").iterdir()) == []


def test_split_of_document_does_not_depend_on_corpus():
    texts = [f"document {n}" for n in range(4000)]
    sides = [is_validation(t, 0.05) for t in texts]
    # 4000 draws at 0.05: standard deviation 13.8; 5 of them
    assert abs(sum(sides) - 200) < 5 * 13.8
    assert [is_validation(t, 0.05) for t in reversed(texts)] == sides[::-1]
    assert all(is_validation(t, 0.2) for t, side in zip(texts, sides, strict=True) if side)  # a larger share adds


def test_empty_validation_store_prevents_train_store(tmp_path, tokenizer):
    text = next(f"t{n}" for n in range(99) if not is_validation(f"t{n}", 0.5))
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match="validation: no documents"):
        prepare_corpus(
            [tmp_path / "a.txt"], tokenizer, tmp_path / "out", PrepareSettings(validation_share=0.5, workers=1)
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_a_foreign_megatron_pair_becomes_the_same_store(tmp_path, tokenizer):
    encode = load_tokenizer(tokenizer).encode
    documents = [encode(text).ids for text in ("one", "two", "three")]
    store = write_store(tmp_path / "store", documents, tokenizer)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"foreign{suffix}").write_bytes((store.path / f"shard_00000{suffix}").read_bytes())
    made = import_megatron([tmp_path / "foreign"], tokenizer, tmp_path / "out")["train"]
    copy = TokenStore.open(tmp_path / "out/train")
    assert made.fingerprint == store.manifest.fingerprint
    assert made.text_bytes == store.manifest.text_bytes == 11
    assert texts_of(copy) == ["one", "two", "three"]
    (tmp_path / "foreign.bin").write_bytes(b"\0" * 7)
    with pytest.raises(DataError, match=r"foreign\.bin has 7 bytes, foreign\.idx describes 28"):
        import_megatron([tmp_path / "foreign"], tokenizer, tmp_path / "again")


def test_sequences_of_a_megatron_document_are_joined_and_empty_ones_dropped(tmp_path, tokenizer):
    import struct

    # int32; sequences [5 6] [] [7 0] [8]; documents: sequences 0-2, none, sequence 3
    sizes, values = [2, 0, 2, 1], [5, 6, 7, 0, 8]
    pointers = [0, 8, 8, 16]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 4, 4)
    index += struct.pack("<4i", *sizes) + struct.pack("<4q", *pointers) + struct.pack("<4q", 0, 3, 3, 4)
    (tmp_path / "foreign.idx").write_bytes(index)
    (tmp_path / "foreign.bin").write_bytes(struct.pack("<5i", *values))
    import_megatron([tmp_path / "foreign"], tokenizer, tmp_path / "out")
    store = TokenStore.open(tmp_path / "out/train")
    assert [store[i].tolist() for i in range(len(store))] == [[5, 6, 7, 0], [8, 0]]
    (tmp_path / "foreign.bin").write_bytes(struct.pack("<5i", 5, 6, 7, 0, 300))
    with pytest.raises(DataError, match="document 1: token 300"):
        import_megatron([tmp_path / "foreign"], tokenizer, tmp_path / "again")
    (tmp_path / "foreign.idx").write_bytes(index[:-8] + struct.pack("<q", 3))
    with pytest.raises(DataError, match="does not divide its 4 sequences"):
        import_megatron([tmp_path / "foreign"], tokenizer, tmp_path / "again")


@pytest.mark.parametrize("bad", [300, 1 << 31, 1 << 32, (1 << 63) - 1, -1, -(1 << 40)])
def test_ids_of_a_foreign_pair_that_no_vocabulary_has_are_named(tmp_path, tokenizer, bad):
    ids = np.array([5, 6, 0, 7, bad], dtype=np.int64)
    ids.tofile(tmp_path / "foreign.bin")
    (tmp_path / "foreign.idx").write_bytes(index_bytes(np.array([3, 2]), ids.dtype))
    with pytest.raises(DataError, match=rf"document 1: token {bad} is not in \[0, 257\)"):
        import_megatron([tmp_path / "foreign"], tokenizer, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_multimodal_pair_is_refused_by_kind(tmp_path, tokenizer):
    np.array([5, 6, 0, 7, 0], dtype=np.uint16).tofile(tmp_path / "foreign.bin")
    index = index_bytes(np.array([3, 2]), np.dtype(np.uint16))
    (tmp_path / "foreign.idx").write_bytes(index + bytes([0, 1]))
    with pytest.raises(DataError, match="multimodal Megatron index: 2 sequence modes") as caught:
        import_megatron([tmp_path / "foreign"], tokenizer, tmp_path / "out")
    assert "not supported" in str(caught.value)
    for extra in (1, 3):
        (tmp_path / "foreign.idx").write_bytes(index + bytes(extra))
        with pytest.raises(DataError, match=r"foreign\.idx is damaged"):
            import_megatron([tmp_path / "foreign"], tokenizer, tmp_path / "out")


def test_demo_text_matches_listed_checksums():
    import hashlib

    demo = ROOT / "kdtrain/assets/demo"
    files = sorted(demo.glob("*.jsonl.xz"))
    assert len(files) == 2
    assert sum(f.stat().st_size for f in files) <= 2_500_000
    listed = (demo / "SOURCES.md").read_text()
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() in listed
        records = [json.loads(line) for line in lzma.decompress(file.read_bytes()).decode().splitlines()]
        assert len(records) > 200
        assert len({r["text"] for r in records}) == len(records)
        assert all(r["source"] and len(r["text"]) >= 400 for r in records)
        assert f"| {len(records)} |" in listed
