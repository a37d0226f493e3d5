"""The document prefix, most often <bos>: taken from the tokenizer, written once per document, recorded, optional."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kdtrain.config.cli import run_script
from kdtrain.config.load import load_run
from kdtrain.data.import_megatron import MegatronSettings, import_megatron
from kdtrain.data.megatron_index import index_bytes
from kdtrain.data.prepare import PrepareSettings, prepare_corpus
from kdtrain.data.token_store import TokenStore, TokenStoreWriter
from kdtrain.data.tokenizer import document_prefix, load_tokenizer
from kdtrain.errors import EXIT_DONE, ConfigError, DataError
from kdtrain.jobs.inputs import open_inputs
from kdtrain.models.load import ModelSpec
from kdtrain.models.tiny import tiny_config
from kdtrain.testing.ranks import load_file
from tests.support.tiny_data import SEPARATOR_ID, write_tokenizer

BOS, EOS, CLS = 257, 258, 259
ROOT = Path(__file__).resolve().parents[2]


def with_template(folder, single, pair="<eos> $A $B:1 <eos>:1", before=()):
    """A byte-level tokenizer whose post-processor is `before` and then the template."""
    write_tokenizer(folder, more=["<bos>", "<eos>", "<cls>"])
    tokenizer = load_tokenizer(folder)
    names = [("<bos>", BOS), ("<eos>", EOS), ("<cls>", CLS)]
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=names)
    tokenizer.post_processor = processors.Sequence([*before, template]) if before else template
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("single", "before", "prefix"),
    [
        ("<bos> $A", (), [BOS]),
        ("<bos> $A <eos>", (), [BOS]),
        ("<bos> $A", (processors.ByteLevel(trim_offsets=False),), [BOS]),
        ("<bos> <cls> $A <eos> <eos>", (), [BOS, CLS]),
        ("$A <eos>", (), []),
        ("$A", (), []),
    ],
)
def test_the_prefix_is_what_the_post_processor_puts_before_a_text(tmp_path, single, before, prefix):
    assert document_prefix(with_template(tmp_path, single, before=before)) == prefix


def test_a_tokenizer_without_post_processor_has_no_prefix(tmp_path):
    assert document_prefix(write_tokenizer(tmp_path)) == []


def test_the_prefix_is_found_with_any_word_the_vocabulary_can_write(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"two words": 0, "word": 1, "<s>": 2}, unk_token="none"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert document_prefix(tmp_path) == [2]
    Tokenizer(models.WordLevel({}, unk_token="none")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer\.json: no text has tokens\n  fix: "):
        document_prefix(tmp_path)


@pytest.mark.parametrize("single", ["<bos> $A", "<bos> $A <eos>"])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_document_begins_with_exactly_one_bos(tmp_path, single, workers):
    tokenizer = with_template(tmp_path / "tokenizer", single)
    texts = ["one", "two words", "na\u00efve", "<bos>brought along"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = prepare_corpus([tmp_path / "a.jsonl"], tokenizer, tmp_path / "out", PrepareSettings(workers=workers))
    store = TokenStore.open(tmp_path / "out/train")
    store.verify()
    encode = load_tokenizer(tokenizer).encode
    for number, text in enumerate(texts):
        ids = encode(text.removeprefix("<bos>"), add_special_tokens=False).ids
        assert store[number].tolist() == [BOS, *ids, SEPARATOR_ID]
    assert store.document_starts(0, store.num_tokens).tolist() == np.flatnonzero(store.tokens(0, 36) == BOS).tolist()
    assert store.manifest.document_prefix == (BOS,)
    assert json.loads((store.path / "manifest.json").read_text())["document_prefix"] == [BOS]
    assert made["train"].text_bytes == sum(len(text.encode()) for text in texts)


def test_bos_never_writes_no_prefix_and_text_bytes_are_unchanged(tmp_path):
    tokenizer = with_template(tmp_path / "tokenizer", "<bos> $A <eos>")
    (tmp_path / "a.txt").write_text("text")
    made = {
        bos: prepare_corpus([tmp_path / "a.txt"], tokenizer, tmp_path / bos, PrepareSettings(workers=1, bos=bos))
        for bos in ("auto", "never")
    }
    tokens = {bos: TokenStore.open(tmp_path / bos / "train")[0].tolist() for bos in made}
    assert tokens["auto"] == [BOS, *tokens["never"]]
    assert tokens["never"] == [*load_tokenizer(tokenizer).encode("text", add_special_tokens=False).ids, SEPARATOR_ID]
    assert made["never"]["train"].document_prefix == ()
    assert made["never"]["train"].text_bytes == made["auto"]["train"].text_bytes == 4
    with pytest.raises(ConfigError, match=r"bos = 'always' is not a token of .*\n  fix: name one of its"):
        prepare_corpus([tmp_path / "a.txt"], tokenizer, tmp_path / "x", PrepareSettings(bos="always"))


def test_script_logs_document_prefix(tmp_path, logged, monkeypatch):
    script = load_file(ROOT / "launch/prepare_corpus.py")
    monkeypatch.setattr("kdtrain.log.setup_logging", lambda: None)
    tokenizer = with_template(tmp_path / "tokenizer", "<bos> $A")
    (tmp_path / "a.txt").write_text("text")
    for words, prefix in (([], (BOS,)), (["--bos", "auto"], (BOS,)), (["--bos", "never"], ())):
        logged.clear()
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        base = ["--tokenizer", str(tokenizer), "--output", str(out), "--workers", "1", *words, str(tmp_path / "a.txt")]
        assert run_script(script.main, base) == EXIT_DONE
        assert TokenStore.open(out / "train").manifest.document_prefix == prefix
        assert ("each document begins with <bos> (tokens [257])" in logged.text) == bool(prefix)


@pytest.mark.parametrize("bos", ["auto", "never"])
def test_documents_of_megatron_pair_get_prefix(tmp_path, bos):
    tokenizer = with_template(tmp_path / "tokenizer", "<bos> $A <eos>")
    documents = [[BOS, 5, 6, SEPARATOR_ID], [7, 8], [BOS, 9]]
    np.concatenate(documents).astype(np.uint16).tofile(tmp_path / "pair.bin")
    (tmp_path / "pair.idx").write_bytes(index_bytes(np.array([4, 2, 2]), np.dtype(np.uint16)))
    made = import_megatron([tmp_path / "pair"], tokenizer, tmp_path / "out", MegatronSettings(bos=bos))["train"]
    store = TokenStore.open(tmp_path / "out/train")
    store.verify()
    found = [store[i].tolist() for i in range(3)]
    if bos == "auto":
        assert found == [[BOS, 5, 6, 0], [BOS, 7, 8, 0], [BOS, 9, 0]]
        assert made.text_bytes == 5  # of five bytes of text
    else:
        assert found == [[BOS, 5, 6, 0], [7, 8, 0], [BOS, 9, 0]]


def test_manifest_without_prefix_field_means_no_prefix(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    with TokenStoreWriter(tmp_path / "store", tokenizer, SEPARATOR_ID, source="x") as writer:
        writer.add([5, 6], 2)
        writer.commit()
    file = tmp_path / "store/manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest.pop("document_prefix") == []
    file.write_text(json.dumps(manifest))
    assert TokenStore.open(tmp_path / "store").manifest.document_prefix == ()


@pytest.mark.parametrize(
    ("prefix", "why"),
    [
        ("x", r"document_prefix\[0\] is 'x', must be a whole number in \[0, 260\)"),
        ([260], r"document_prefix\[0\] is 260"),
        ([BOS, 5.0], r"document_prefix\[1\] is 5\.0"),
        (5, "is damaged"),
        ([EOS], r"document 0 does not begin with document_prefix \[258\]"),
        ([BOS, 5, 6, 7, 8, 9], "document 0 does not begin with"),
    ],
)
def test_manifest_prefix_missing_in_documents_is_refused(tmp_path, prefix, why):
    tokenizer = with_template(tmp_path / "tokenizer", "<bos> $A")
    with TokenStore.create(tmp_path / "s", tokenizer, SEPARATOR_ID, source="x", document_prefix=[BOS]) as writer:
        for ids in ([5, 6], [7], [8]):
            writer.add(ids, len(ids))
        writer.commit()
    TokenStore.open(tmp_path / "s").verify()
    file = tmp_path / "s/manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"document_prefix": prefix}))
    with pytest.raises(DataError, match=why):
        TokenStore.open(tmp_path / "s")


def test_verify_checks_beginning_of_every_document(tmp_path):
    tokenizer = with_template(tmp_path / "tokenizer", "<bos> $A")
    with TokenStoreWriter(tmp_path / "s", tokenizer, SEPARATOR_ID, source="x") as writer:
        for ids in ([BOS, 5, 6], [7], [BOS, 8]):
            writer.add(ids, len(ids))
        writer.commit()
    file = tmp_path / "s/manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"document_prefix": [BOS]}))
    store = TokenStore.open(tmp_path / "s")
    with pytest.raises(DataError, match=r"document 1 does not begin with document_prefix \[257\]"):
        store.verify()


@pytest.mark.parametrize(("single", "bos", "warns"), [("<bos> $A", "never", True), ("<bos> $A", "auto", False)])
def test_run_warns_when_document_prefix_differs_from_models(tmp_path, caplog, single, bos, warns):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "the teacher reads this"}) + "\n")
    model = with_template(tmp_path / "model", single)
    (model / "config.json").write_text(json.dumps(tiny_config("qwen3", vocab_size=260)))
    prepare_corpus([text], model, tmp_path / "store", PrepareSettings(bos=bos, workers=1))
    config = tmp_path / "run.yaml"
    config.write_text("run: {name: x}\ntrain: {total_tokens: 1024}\n")
    words = [f"student.architecture={model / 'config.json'}", f"teacher.weights={model}"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="kdtrain"):
        cfg = load_run([str(config), *words, f"data.train=[{tmp_path / 'store' / 'train'}]"]).config
        open_inputs(cfg, [ModelSpec(weights=str(model))])
    assert (f"puts the ids [{BOS}] before every text" in caplog.text) == warns


@pytest.mark.parametrize("bos", ["<bos>", {"content": "<bos>", "lstrip": False}])
def test_add_bos_token_without_post_processor_needs_a_choice(tmp_path, bos):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", more=["<bos>"])
    config, text = tokenizer / "tokenizer_config.json", tmp_path / "a.txt"
    text.write_text("ab")
    config.write_text(json.dumps({"add_bos_token": True, "bos_token": bos}))
    with pytest.raises(ConfigError, match=r"add_bos_token = true(.|\n)*fix: --bos '<bos>' puts it(.|\n)*--bos never"):
        prepare_corpus([text], tokenizer, tmp_path / "x", PrepareSettings(workers=1))
    for chosen, prefix in (("<bos>", [BOS]), ("never", [])):
        prepare_corpus([text], tokenizer, tmp_path / chosen, PrepareSettings(workers=1, bos=chosen))
        store = TokenStore.open(tmp_path / chosen / "train")
        assert list(store.manifest.document_prefix) == prefix
        assert store[0].tolist()[: len(prefix)] == prefix
        assert len(store[0]) == len(prefix) + 3
    for settings in ({"add_bos_token": False, "bos_token": bos}, {"add_bos_token": True, "bos_token": None}, {}):
        config.write_text(json.dumps(settings))
        made = prepare_corpus(
            [text], tokenizer, tmp_path / str(len(settings)) / str(settings), PrepareSettings(workers=1)
        )
        assert made["train"].document_prefix == ()
