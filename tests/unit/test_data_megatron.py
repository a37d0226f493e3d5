"""Megatron pairs made elsewhere: document borders are found in the tokens, and ambiguous pairs are refused."""

import json
from functools import partialmethod
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from kdtrain.config.cli import run_script
from kdtrain.data import import_megatron as importing
from kdtrain.data import token_store
from kdtrain.data.import_megatron import MegatronSettings, import_megatron
from kdtrain.data.token_store import TokenStore
from kdtrain.data.tokenizer import load_tokenizer
from kdtrain.errors import EXIT_CONFIG, EXIT_DATA, EXIT_DONE, ConfigError, DataError
from kdtrain.testing.ranks import load_file
from tests.support.tiny_data import random_documents, write_pair, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BOS, EOS = 257, 258
STREAM = [5, 6, 7, 0, 8, 9, 10, 11, 12, 13, 14, 0, 15, 16, 0, 17, 18, 19]
TEXTS = [[5, 6, 7, 0], [8, 9, 10, 11, 12, 13, 14, 0], [15, 16, 0], [17, 18, 19, 0]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), more=["<bos>", "</s>"])


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("with_bos"), more=["<bos>", "</s>"])
    tokenizer = load_tokenizer(folder)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def script():
    return load_file(ROOT / "launch/prepare_corpus.py")


def rows_of(stream, size):
    return [stream[i : i + size] for i in range(0, len(stream), size)]


def documents_of(folder):
    store = TokenStore.open(folder)
    store.verify()
    return [store[i].tolist() for i in range(len(store))]


def imported(tmp_path, prefix, tokenizer, name="out", **settings):
    import_megatron([prefix], tokenizer, tmp_path / name, MegatronSettings(**settings))
    return documents_of(tmp_path / name / "train")


def refusal(tmp_path, prefix, tokenizer, **settings):
    with pytest.raises(DataError) as caught:
        import_megatron([prefix], tokenizer, tmp_path / "refused", MegatronSettings(**settings))
    assert list((tmp_path / "refused").iterdir()) == []
    return str(caught.value)


def test_an_entry_with_separators_inside_is_refused_with_counts_or_split(tmp_path, tokenizer, script, capsys):
    pair = write_pair(tmp_path / "pair", [[5, 6, 0, 7, 0, 8, 9, 0], [10, 0]])
    words = ["--tokenizer", str(tokenizer), "--output", str(tmp_path / "out"), "--from-megatron", str(pair)]
    assert run_script(script.main, words) == EXIT_DATA
    message = capsys.readouterr().err
    assert "1 of 2 documents hold the separator <|endoftext|> (token 0) inside, 2 times" in message
    for switch in ("--inner-separators split", "--inner-separators keep", "--documents-from stream"):
        assert switch in message
    assert run_script(script.main, [*words, "--inner-separators", "split"]) == EXIT_DONE
    assert documents_of(tmp_path / "out/train") == [[5, 6, 0], [7, 0], [8, 9, 0], [10, 0]]
    assert "4 documents, 10 tokens" in capsys.readouterr().out
    assert imported(tmp_path, pair, tokenizer, "kept", inner_separators="keep") == [[5, 6, 0, 7, 0, 8, 9, 0], [10, 0]]


@pytest.mark.parametrize("choice", ["index", "sequences"])
def test_refusal_offers_only_options_that_resolve_it(tmp_path, tokenizer, choice):
    pair = write_pair(tmp_path / "pair", [[5, 6, 0, 7], [8, 0, 9], [10, 0]])
    everything = refusal(tmp_path, pair, tokenizer).splitlines()[-1]
    for option in ("--documents-from stream", "--documents-from index", "--inner-separators split"):
        assert everything.count(option) == 1
    rest = refusal(tmp_path, pair, tokenizer, documents_from=choice).splitlines()[-1]
    assert "--inner-separators split" in rest
    assert "--documents-from" not in rest
    kept = imported(tmp_path, pair, tokenizer, documents_from=choice, inner_separators="keep")
    assert kept == [[5, 6, 0, 7, 0], [8, 0, 9, 0], [10, 0]]
    named = write_pair(tmp_path / "named", [[5, 6, EOS], [7, EOS]])
    fix = refusal(tmp_path, named, tokenizer).splitlines()[-1]
    assert fix.count("--") == fix.count("--separator") == 2


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 18])
@pytest.mark.parametrize("index", [None, [0]])
def test_rows_cut_from_a_stream_are_refused_and_joined_on_request(tmp_path, tokenizer, logged, size, index):
    pair = write_pair(tmp_path / "pair", rows_of(STREAM, size), index)
    message = refusal(tmp_path, pair, tokenizer)
    assert "--documents-from stream" in message
    if size == 5 and index is None:
        assert "2 of 4 documents hold the separator <|endoftext|> (token 0) inside, 2 times" in message
        assert "3 of 4 documents do not end with the separator <|endoftext|> though others do" in message
    assert imported(tmp_path, pair, tokenizer, documents_from="stream") == TEXTS
    assert f"4 documents of {-(-18 // size)} sequences (joined as one stream" in logged.text
    assert "1 had no separator <|endoftext|> at the end; one is added to each" in logged.text


def test_documents_cut_at_a_largest_size_are_refused_without_a_separator_inside_any_row(tmp_path, tokenizer):
    pair = write_pair(tmp_path / "pair", [[5, 6, 7], [8, 0], [9, 0], [10, 11, 12], [13, 14, 15], [16, 0]])
    message = refusal(tmp_path, pair, tokenizer)
    assert "3 of 6 documents do not end with the separator <|endoftext|> though others do" in message
    texts = [[5, 6, 7, 8, 0], [9, 0], [10, 11, 12, 13, 14, 15, 16, 0]]
    assert imported(tmp_path, pair, tokenizer, documents_from="stream") == texts
    whole = imported(tmp_path, pair, tokenizer, "whole", documents_from="index")
    assert whole == [[5, 6, 7, 0], [8, 0], [9, 0], [10, 11, 12, 0], [13, 14, 15, 0], [16, 0]]


def test_rows_of_one_size_without_any_separator_are_refused(tmp_path, tokenizer):
    pair = write_pair(tmp_path / "pair", rows_of(list(range(5, 27)), 5))
    assert "none ends with the separator <|endoftext|>, and all but the last have 5 tokens" in refusal(
        tmp_path, pair, tokenizer
    )
    message = refusal(tmp_path, pair, tokenizer, documents_from="stream")
    assert "no token of its 22 is the separator <|endoftext|> (token 0)" in message
    assert len(imported(tmp_path, pair, tokenizer, documents_from="sequences")) == 5


def test_documents_of_a_pair_built_without_separators_get_one_each(tmp_path, tokenizer):
    pair = write_pair(tmp_path / "pair", [[5, 6], [7], [8, 9, 10]])
    assert imported(tmp_path, pair, tokenizer) == [[5, 6, 0], [7, 0], [8, 9, 10, 0]]


def test_document_with_bos_does_not_continue_previous_one(tmp_path, with_bos):
    rows = [[BOS, 5, 6, 0], [BOS, 7, 8], [BOS, 9, 0], [BOS, 10]]
    pair = write_pair(tmp_path / "pair", rows)
    assert imported(tmp_path, pair, with_bos) == [[*row, 0] if row[-1] else row for row in rows]
    bare = write_pair(tmp_path / "bare", [row[1:] for row in rows])
    assert "2 of 4 documents do not end" in refusal(tmp_path, bare, with_bos)


def test_special_token_before_every_document_is_logged_if_not_prefix(tmp_path, tokenizer, with_bos, logged):
    pair = write_pair(tmp_path / "pair", [[BOS, 5, 0], [BOS, 6, 0]])
    line = "each begins with <bos> (token 257), which counts as text"
    assert imported(tmp_path, pair, tokenizer) == [[BOS, 5, 0], [BOS, 6, 0]]
    assert line in logged.text
    logged.clear()
    assert imported(tmp_path, pair, with_bos, "with_bos") == [[BOS, 5, 0], [BOS, 6, 0]]
    assert line not in logged.text


def test_other_special_token_at_document_ends_is_named(tmp_path, tokenizer):
    pair = write_pair(tmp_path / "pair", [[5, 6, EOS], [7, EOS]])
    message = refusal(tmp_path, pair, tokenizer)
    assert "every document ends with </s> (token 258), none with the separator <|endoftext|>" in message
    assert "--separator '</s>'" in message
    assert imported(tmp_path, pair, tokenizer, separator="</s>") == [[5, 6, EOS], [7, EOS]]
    named = imported(tmp_path, pair, tokenizer, "named", separator="<|endoftext|>")
    assert named == [[5, 6, EOS, 0], [7, EOS, 0]]


def test_pair_without_document_ends_is_refused_and_accepted_with_options(tmp_path, tokenizer):
    # as written by MiniPLM's and LMOps' builders: sequences are added, end_document is never called
    pair = write_pair(tmp_path / "pair", [[5, 6, 0], [7, 8, 9, 0], [10, 0]], [0], "int32")
    message = refusal(tmp_path, pair, tokenizer)
    assert "no document was ever ended: its document index is [0] over 3 sequences" in message
    assert "dtype" not in message
    assert "--documents-from sequences" in message
    assert "--documents-from stream" in message
    for choice in ("sequences", "stream"):
        assert imported(tmp_path, pair, tokenizer, choice, documents_from=choice) == [[5, 6, 0], [7, 8, 9, 0], [10, 0]]


@pytest.mark.parametrize(
    ("index", "dtype", "reason"),
    [
        ([0, 1, 2, 3], "float32", "its sequences are float32, which are not token ids"),
        ([0, 2, 1, 3], "uint16", "its document index is not in order: entry 2 is 1, after 2"),
        ([0, 1, 2], "uint16", "its document index does not divide its 3 sequences: it ends with 2"),
        ([0, 1, 4], "uint16", "its document index does not divide its 3 sequences: it ends with 4"),
        ([1, 3], "uint16", "its document index begins with sequence 1, not 0"),
        ([0], "uint16", "no document was ever ended: its document index is [0] over 3 sequences"),
        ([], "uint16", "no document was ever ended: its document index is [] over 3 sequences"),
    ],
)
def test_each_fault_of_a_document_index_has_its_own_reason(tmp_path, tokenizer, index, dtype, reason):
    pair = write_pair(tmp_path / "pair", [[5, 0], [6, 7, 0], [8, 0]], index, dtype)
    assert reason in refusal(tmp_path, pair, tokenizer)


def test_sentences_of_one_document_are_joined(tmp_path, tokenizer):
    sentences = [[5, 6], [7, 8, 9], [10, 0], [11], [12, 13, 0]]
    pair = write_pair(tmp_path / "pair", sentences, [0, 3, 5])
    assert imported(tmp_path, pair, tokenizer) == [[5, 6, 7, 8, 9, 10, 0], [11, 12, 13, 0]]


def test_empty_documents_are_left_out_and_counted(tmp_path, tokenizer, logged):
    pair = write_pair(tmp_path / "pair", [[5, 0], [], [6, 0, 0, 7, 0]], [0, 1, 1, 2, 3])
    assert imported(tmp_path, pair, tokenizer, inner_separators="split") == [[5, 0], [6, 0], [7, 0]]
    # one of no sequence, one of an empty sequence, one between two separators
    assert "left out: 3 empty documents" in logged.text
    assert json.loads((tmp_path / "out/train/manifest.json").read_text())["left_out"] == {"empty documents": 3}
    pair = write_pair(tmp_path / "whole", [[5, 0], [6, 0]])
    imported(tmp_path, pair, tokenizer, "again")
    assert "left_out" not in json.loads((tmp_path / "again/train/manifest.json").read_text())


def with_marks(documents, rng, bos):
    """Documents as a builder may have written them: some with <bos>, some without the separator, some empty."""
    found = []
    for ids in documents:
        kind = int(rng.integers(0, 4))
        before, after = [BOS] * (bos and kind != 1), [0] * (kind != 2)
        found.append([] if kind == 3 else before + [t for t in ids if t] + after)
    return found


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("block", [1, 50, 1 << 21])
def test_copy_in_blocks_equals_copy_by_documents(tmp_path, tokenizer, with_bos, monkeypatch, dtype, bos, block):
    monkeypatch.setattr(importing, "BLOCK_TOKENS", block)
    writer = token_store.TokenStoreWriter
    monkeypatch.setattr(writer, "__init__", partialmethod(writer.__init__, shard_tokens=300))
    folder = with_bos if bos else tokenizer
    rng = np.random.default_rng(7)
    documents = with_marks(random_documents(120, seed=11), rng, bos)
    pair = write_pair(tmp_path / "pair", documents, dtype=dtype)
    import_module("bench_import").naive(pair, folder, tmp_path / "naive")
    import_megatron([pair], folder, tmp_path / "blocks", MegatronSettings(documents_from="index"))
    files = sorted(p.relative_to(tmp_path / "naive") for p in (tmp_path / "naive").rglob("*") if p.is_file())
    assert len(files) > 8
    for file in files:
        wanted, found = ((tmp_path / name / file).read_bytes() for name in ("naive", "blocks"))
        if file.name == "manifest.json":
            content = json.loads(found)
            assert content.pop("left_out") == {"empty documents": documents.count([])}
            found = (json.dumps(content, indent=2) + "\n").encode()
        assert found == wanted, file


def test_options_of_pairs_and_of_text_are_not_mixed(tmp_path, tokenizer, script, capsys):
    base = ["--tokenizer", str(tokenizer), "--output", str(tmp_path / "out"), "x"]
    for words in (["--documents-from", "stream"], ["--in-place"]):
        with pytest.raises(SystemExit) as caught:
            run_script(script.main, [*base, *words])
        assert caught.value.code == EXIT_CONFIG
        assert f"{words[0]} needs --from-megatron" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_script(script.main, [*base, "--from-megatron", "--skip-invalid"])
    assert "--from-megatron cannot be used with --skip-invalid" in capsys.readouterr().err
    for name in ("documents_from", "inner_separators"):
        with pytest.raises(ConfigError, match=f"{name} = 'x' is not known\n  fix: use one of "):
            import_megatron([tmp_path / "p"], tokenizer, tmp_path / "out", MegatronSettings(**{name: "x"}))
    both = MegatronSettings(documents_from="stream", inner_separators="keep")
    with pytest.raises(ConfigError, match=r"'stream' cannot be used with inner_separators = 'keep'(.|\n)*fix: "):
        import_megatron([tmp_path / "p"], tokenizer, tmp_path / "out", both)


def test_a_pair_that_is_named_twice_is_refused(tmp_path, tokenizer, monkeypatch):
    pair = write_pair(tmp_path / "pair", [[5, 0]])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="pair is named twice\n  why: every document would occur twice"):
        import_megatron([pair, Path("pair")], tokenizer, tmp_path / "out", MegatronSettings())


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("v1.2.bin", "v1.2 without either suffix"),
        ("v1.2.idx", "v1.2 without either suffix"),
        ("v1.3", "the path of a .bin and its .idx without either suffix"),
        ("", "the path of a .bin and its .idx without either suffix"),
        ("/", "the path of a .bin and its .idx without either suffix"),
    ],
)
def test_path_that_is_not_a_pair_prefix_is_refused(tmp_path, tokenizer, monkeypatch, name, fix):
    write_pair(tmp_path / "v1.2", [[5, 6, 0]])
    monkeypatch.chdir(tmp_path)
    assert imported(tmp_path, Path("v1.2"), tokenizer, "good") == [[5, 6, 0]]
    with pytest.raises(ConfigError, match=f"{Path(name)} is not the prefix of a Megatron pair: (.|\n)*fix: name {fix}"):
        import_megatron([name], tokenizer, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
