"""Stores, teacher and student with different tokenizers or rows train if the ids of the data are the same in all."""

import json

import pytest

from kdtrain.config.cli import parse
from kdtrain.config.load import load_run
from kdtrain.data.token_store import TokenStore, TokenStoreWriter
from kdtrain.data.used_ids import scan_ids
from kdtrain.errors import ConfigError, DataError, StoreMismatch
from kdtrain.jobs.build.models import model_specs
from kdtrain.jobs.eval_model import run_evaluation
from kdtrain.jobs.inputs import open_inputs
from kdtrain.jobs.sequence_prefix import prefix_choice
from kdtrain.models.tiny import save_random, tiny_config
from tests.support.tiny_data import random_documents, write_tokenizer

FEW, MANY = ["<a>"], ["<a>", "<tool>", "<think>"]
TOOL, THINK = 258, 259


def model(folder, more, rows, **tokenizer):
    save_random(write_tokenizer(folder, more=more, **tokenizer), tiny_config("llama", vocab_size=rows))
    return folder


def store(folder, tokenizer, *, ids=(), seed=0, recorded=True):
    """Documents of bytes; the first one also has `ids`. recorded: as it is written now, or as older stores were."""
    first, *others = random_documents(9, seed=seed)
    with TokenStoreWriter(folder, tokenizer, 0, source="x") as writer:
        for document in ([*first, *ids], *others):
            writer.add(document, len(document))
        writer.commit()
    if not recorded:
        file = folder / "manifest.json"
        content = json.loads(file.read_text())
        del content["added_ids"]
        file.write_text(json.dumps(content))
    return folder


def configured(tmp_path, train, *, teacher, student=None, validation=None, prefix="auto"):
    (tmp_path / "student.json").write_text(json.dumps(tiny_config("qwen3")))
    (tmp_path / "run.yaml").write_text("run: {name: x}\ntrain: {total_tokens: 1024}\n")
    words = [f"data.train=[{train}]", f"teacher.weights={teacher}"]
    words += [f"student.architecture={tmp_path / 'student.json'}" if student is None else f"student.weights={student}"]
    words += [] if validation is None else [f"data.validation={validation}"]
    return load_run([str(tmp_path / "run.yaml"), *words, f"data.sequence_prefix={prefix}"]).config


def opened(*args, **kwargs):
    cfg = configured(*args, **kwargs)
    return open_inputs(cfg, model_specs(cfg))


def refused(*args, **kwargs):
    with pytest.raises(StoreMismatch) as caught:
        opened(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("prepared_with", ["teacher", "student"])
def test_models_with_different_added_tokens_train_on_the_shared_vocabulary(tmp_path, prepared_with, recorded, logged):
    teacher, student = model(tmp_path / "teacher", MANY, 272), model(tmp_path / "student", FEW, 264)
    data = store(tmp_path / "data", tmp_path / prepared_with, recorded=recorded)
    inputs = opened(tmp_path, data, teacher=teacher, student=student)
    assert (inputs.vocab_size, inputs.total_rows) == (258, 272), "ids that both tokenizers have; rows of the larger"
    assert ("the softmax has 258 of the tokenizer's 260 ids" in logged.text) == (prepared_with == "teacher")
    assert "without rows" not in logged.text, "the student's own tokenizer has a row for each of its tokens"
    logged.clear()
    opened(tmp_path, data, teacher=student, student=teacher)
    assert "without rows for these tokens" in logged.text
    assert "258 ('<tool>'), 259 ('<think>'); text that holds them" in logged.text


@pytest.mark.parametrize("recorded", [True, False])
def test_id_of_the_data_that_one_model_lacks_is_refused_by_name(tmp_path, recorded):
    teacher, student = model(tmp_path / "teacher", MANY, 272), model(tmp_path / "student", FEW, 264)
    data = store(tmp_path / "data", teacher, ids=[THINK], recorded=recorded)
    message = refused(tmp_path, data, teacher=teacher, student=student)
    assert (
        f"{data} holds the ids 259 ('<think>'); the tokenizer of student.weights = {student} does not have" in message
    )
    assert "leave out the texts that hold these tokens" in message
    assert "--tokenizer" not in message


def test_ids_with_two_tokens_are_refused_only_if_they_occur(tmp_path):
    teacher, student = model(tmp_path / "teacher", MANY, 272), model(tmp_path / "student", ["<a>", "<x>", "<y>"], 272)
    assert opened(tmp_path, store(tmp_path / "no", teacher), teacher=teacher, student=student).vocab_size == 260
    message = refused(tmp_path, store(tmp_path / "yes", teacher, ids=[TOOL]), teacher=teacher, student=student)
    assert "258 ('<tool>'); the tokenizer of student.weights" in message
    assert "calls it '<x>'" in message


@pytest.mark.parametrize("recorded", [True, False])
def test_unused_token_without_a_row_is_accepted(tmp_path, recorded):
    """As Gemma 3's tokenizer, which has one token more than its text model has rows."""
    teacher = model(tmp_path / "teacher", FEW, 257)
    data = store(tmp_path / "data", teacher, recorded=recorded)
    inputs = opened(tmp_path, data, teacher=teacher)
    assert (inputs.vocab_size, inputs.total_rows) == (257, 257)
    other = store(tmp_path / "other", teacher, ids=[257], seed=1, recorded=recorded)
    message = refused(tmp_path, other, teacher=teacher)
    assert f"{other} holds the ids 257 ('<a>'); model '{teacher}' has rows for the ids below 257 only" in message
    assert f"{other} holds" in refused(tmp_path, data, teacher=teacher, validation=other)


def test_model_of_another_tokenizer_is_refused_with_the_ids(tmp_path):
    teacher = model(tmp_path / "teacher", (), 101)
    message = refused(tmp_path, store(tmp_path / "data", teacher), teacher=teacher)
    assert "holds the ids 101 (" in message
    assert "more; model" in message


def test_stores_with_different_unused_added_tokens_are_accepted(tmp_path):
    few, many = model(tmp_path / "few", FEW, 264), write_tokenizer(tmp_path / "many", more=MANY)
    data = store(tmp_path / "data", few)
    inputs = opened(tmp_path, data, teacher=few, validation=store(tmp_path / "a", many, seed=1))
    assert inputs.vocab_size == 258
    bad = store(tmp_path / "b", many, seed=2, ids=[TOOL])
    message = refused(tmp_path, data, teacher=few, validation=bad)
    assert f"{bad} holds the ids 258 ('<tool>'); the tokenizer of {data} does not have it" in message


def test_fix_for_two_different_tokenizers_is_not_circular(tmp_path):
    teacher, student = model(tmp_path / "teacher", (), 264), model(tmp_path / "student", (), 264, lowercase=True)
    for made_with in (teacher, student):
        data = store(tmp_path / f"data_{made_with.name}", made_with)
        message = refused(tmp_path, data, teacher=teacher, student=student)
        assert "was made with another tokenizer than the" in message
        assert "these differ, so no corpus serves both: 'Hello world' is [" in message
        assert "--tokenizer" not in message
    data = store(tmp_path / "data", write_tokenizer(tmp_path / "t", lowercase=True))
    assert f"launch/prepare_corpus.py --tokenizer {teacher}" in refused(tmp_path, data, teacher=teacher)


def test_store_records_its_added_tokens_and_verify_checks_them(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", more=MANY)
    made = TokenStore.open(store(tmp_path / "data", tokenizer, ids=[THINK]))
    assert made.manifest.added_ids == (0, THINK)
    assert scan_ids(made, range(257, 400)) == [THINK]
    assert made.occurring_ids([TOOL, THINK, 5000]) == [THINK]
    made.verify()
    file = made.path / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "added_ids": [0]}))
    with pytest.raises(
        DataError, match=r"added_ids is \[0\], of the ids outside the trained vocabulary \[0, 259\] occur"
    ):
        TokenStore.open(made.path).verify()
    file.write_text(json.dumps({**content, "added_ids": [0, 260]}))
    with pytest.raises(DataError, match=r"added_ids\[1\] is 260"):
        TokenStore.open(made.path)
    file.write_text(json.dumps({**content, "added_ids": 5}))
    with pytest.raises(DataError, match="is damaged"):
        TokenStore.open(made.path)


def begins_with(folder, name, number):
    """Let the folder's tokenizer put a token before every text."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    prefix, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {name: {"id": name, "ids": [number], "tokens": [name]}}
    pair = [text, {"Sequence": {"id": "B", "type_id": 1}}]
    how = {"type": "TemplateProcessing", "single": [prefix, text], "pair": pair, "special_tokens": tokens}
    file.write_text(json.dumps({**content, "post_processor": how}))


@pytest.mark.parametrize(
    ("student", "rows", "prefix", "why"),
    [
        (FEW, 264, "<think>", "259 before sequences: the tokenizer of student.weights = .* does not have it"),
        (MANY, 259, "<think>", "259 before sequences: model '.*student' has rows for the ids below 259 only"),
        (["<a>", "<x>"], 272, "<tool>", "258 before sequences: the tokenizer of student.weights = .* calls it '<x>'"),
        (["<a>", "<x>"], 272, "auto", "258 before sequences: the tokenizer of student.weights = .* calls it '<x>'"),
    ],
    ids=["no such token", "no row", "named, another token", "the teacher's own, another token"],
)
def test_unshared_sequence_prefix_is_refused(tmp_path, student, rows, prefix, why):
    """On a GPU its embedding would be an untrained row, or that of another token, without a word."""
    teacher, student = model(tmp_path / "teacher", MANY, 272), model(tmp_path / "student", student, rows)
    if prefix == "auto":
        begins_with(teacher, "<tool>", TOOL)
    data = store(tmp_path / "data", teacher)
    cfg = configured(tmp_path, data, teacher=teacher, student=student, prefix=prefix)
    inputs = open_inputs(cfg, model_specs(cfg))
    with pytest.raises(StoreMismatch, match=why):
        prefix_choice(cfg, inputs)
    cfg.data.sequence_prefix = "none"
    assert prefix_choice(cfg, inputs).rivals == [()], "a prefix that cannot be used is not measured either"
    cfg.data.sequence_prefix = "<a>"
    assert prefix_choice(cfg, inputs).likely == (257,)


@pytest.mark.parametrize(
    ("note", "kind", "why"),
    [
        ("{", ConfigError, r"kdtrain\.json is damaged"),
        ('{"sequence_prefix": [259]}', StoreMismatch, "the run that made student.weights = .* puts the id 259 before"),
    ],
    ids=["damaged", "not shared"],
)
def test_check_of_an_evaluation_refuses_an_unusable_prefix_of_an_export(tmp_path, note, kind, why):
    teacher, student = model(tmp_path / "teacher", FEW, 264), model(tmp_path / "student", MANY, 264)
    data = store(tmp_path / "data", teacher)
    held_out = store(tmp_path / "held_out", teacher, seed=1)
    (student / "kdtrain.json").write_text(note)
    configured(tmp_path, data, teacher=teacher, student=student, validation=held_out)
    words = ["data.seq_len=16", "data.sequences_per_micro_batch=2", "data.tokens_per_step=64", "--check"]
    names = [f"student.weights={student}", f"teacher.weights={teacher}", f"data.train=[{data}]"]
    words = [str(tmp_path / "run.yaml"), *names, f"data.validation={held_out}", *words]
    with pytest.raises(kind, match=why):
        run_evaluation(parse(words, None))
    (student / "kdtrain.json").write_text('{"sequence_prefix": [257]}')
    assert run_evaluation(parse(words, None)) == 0
