"""data.sequence_prefix: auto measures and takes the better prefix; a worse explicit one is refused with numbers."""

import itertools
import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdtrain.config.cli import parse
from kdtrain.config.load import load_run
from kdtrain.config.schema import RunConfig
from kdtrain.data.loader import StepLoader, StepShape
from kdtrain.data.packing import PackingSpec, sequence_keys
from kdtrain.data.token_store import TokenStore
from kdtrain.data.tokenizer import load_tokenizer
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError, DataError, StoreMismatch
from kdtrain.jobs import sequence_prefix
from kdtrain.jobs.build.models import build_models, model_specs
from kdtrain.jobs.eval_model import run_evaluation
from kdtrain.jobs.export_hf import exported_prefix
from kdtrain.jobs.inputs import open_inputs
from kdtrain.jobs.sequence_prefix import decide_prefix, measure_prefixes, nll_function, prefix_choice
from kdtrain.jobs.train import run_training
from kdtrain.models.tiny import save_random, tiny_config
from tests.support.bos_models import BOS, EOS, VOCAB, write_bos_run, write_counting_store
from tests.support.tiny_data import random_documents, write_store, write_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix")
    write_bos_run(folder)
    return folder


def configured(world, *words):
    return load_run([str(world / "run.yaml"), *words]).config


def decide(world, *words):
    cfg = configured(world, *words)
    inputs = open_inputs(cfg, model_specs(cfg))
    models = build_models(cfg, inputs, Mesh(), CPU, trainable=True)
    return decide_prefix(cfg, prefix_choice(cfg, inputs), inputs, models, Mesh(), CPU)


@torch.no_grad()
def expected(world, name, prefix, seq_len=16):
    """(nats per token, tokens) over all sequences of S - 1 tokens that begin inside a document, by stock transformers:
    every document by itself, so that nothing is packed."""
    store = TokenStore.open(world / "store")
    model = AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float64).eval()
    stride, total, count, used = seq_len - 1, 0.0, 0, []
    cfg = configured(world)
    for _, sequence in sequence_prefix.sequences_inside([store], PackingSpec(16, True, (BOS,)), None, cfg.run.seed):
        start = sequence * stride
        begins = store.document_starts(start + 1, start + stride + 1)
        stop = int(begins[0]) if len(begins) else start + stride + 1
        text = torch.from_numpy(store.tokens(start, stop))
        logits = model(torch.cat([torch.tensor(prefix, dtype=torch.int64), text])[None]).logits[0, len(prefix) : -1]
        total += float(torch.nn.functional.cross_entropy(logits[:, :VOCAB], text[1:], reduction="sum"))
        count += len(text) - 1
        used.append(sequence)
    assert len(set(used)) == 64
    return total / count, count


@pytest.mark.parametrize(("name", "better"), [("needs", (BOS,)), ("disturbed", ())])
def test_auto_takes_the_better_prefix_and_logs_both_numbers(world, logged, name, better):
    assert decide(world, f"teacher.weights={world / name}") == better
    (line,) = [m for m in logged.messages if m.startswith("prefix ")]
    (without, count), (with_bos, same) = (expected(world, name, prefix) for prefix in ((), (BOS,)))
    assert count == same
    assert abs(without - with_bos) > 3
    chosen = "'<bos>' (id 257)" if better else "no prefix"
    assert line == (
        f"prefix   {chosen}: teacher's nll {without:.3f} with no prefix, {with_bos:.3f} with '<bos>' (id 257) "
        f"({count} tokens of 64 sequences that begin inside a document)"
    )


@pytest.mark.parametrize("size", [1, 3, 4, 200])
def test_measured_numbers_do_not_depend_on_the_micro_batch(world, size):
    cfg = configured(world, f"data.sequences_per_micro_batch={size}")
    inputs = open_inputs(cfg, model_specs(cfg))
    models = build_models(cfg, inputs, Mesh(), CPU, trainable=True)
    found = measure_prefixes(nll_function(models), [(), (BOS,)], inputs.train, cfg, Mesh(), CPU)
    for prefix in ((), (BOS,)):
        nll, count = expected(world, "needs", prefix)
        assert found.nll[prefix] == pytest.approx(nll, rel=1e-4)
        assert (found.num_tokens, found.num_sequences) == (count, 64)


@pytest.mark.parametrize(
    ("teacher", "value", "best"),
    [
        ("needs", "none", "'<bos>' (id 257)"),
        ("disturbed", "<bos>", "no prefix"),
        ("needs", "<eos>", "'<bos>' (id 257)"),
    ],
)
def test_worse_explicit_prefix_is_refused_with_numbers_unless_allowed(world, logged, teacher, value, best):
    words = (f"teacher.weights={world / teacher}", f"data.sequence_prefix={value}")
    with pytest.raises(ConfigError) as caught:
        decide(world, *words)
    message = str(caught.value)
    assert message.startswith(f"data.sequence_prefix = {value} is worse than {best}\n  teacher's nll ")
    for prefix, name in (((), "no prefix"), ((BOS,), "'<bos>' (id 257)")):
        assert f"{expected(world, teacher, prefix)[0]:.3f} with {name}" in message
    assert "fix: set data.sequence_prefix=auto, which takes the better, or data.allow_worse_prefix=true" in message
    ids = {"none": (), "<bos>": (BOS,), "<eos>": (EOS,)}[value]
    assert decide(world, *words, "data.allow_worse_prefix=true") == ids
    assert logged.messages[-1].startswith("prefix   ")


@pytest.mark.parametrize(("teacher", "value", "ids"), [("needs", "<bos>", (BOS,)), ("disturbed", "none", ())])
def test_best_explicit_prefix_is_kept(world, teacher, value, ids):
    assert decide(world, f"teacher.weights={world / teacher}", f"data.sequence_prefix={value}") == ids


def test_student_from_weights_is_measured_without_a_teacher(world, logged):
    student = ("student.architecture=null", f"student.weights={world / 'needs'}")
    alone = ("teacher.weights=null", "objective.name=pretrain")
    assert decide(world, *alone, *student) == (BOS,)
    assert "student's nll" in logged.messages[-1]
    # the labels are right whatever begins a sequence: an explicit choice is not measured
    assert decide(world, *alone, *student, "data.sequence_prefix=none") == ()
    logged.clear()
    assert decide(world, *alone) == ()
    assert [m for m in logged.messages if m.startswith("prefix ")] == [
        "prefix   auto: none before sequences, as there are no weights of a model to measure with"
    ]


def test_measured_student_stays_in_training_mode(world):
    cfg = configured(
        world,
        "teacher.weights=null",
        "objective.name=pretrain",
        "student.architecture=null",
        f"student.weights={world / 'needs'}",
    )
    inputs = open_inputs(cfg, model_specs(cfg))
    models = build_models(cfg, inputs, Mesh(), CPU, trainable=True)
    assert models.student.training
    decide_prefix(cfg, prefix_choice(cfg, inputs), inputs, models, Mesh(), CPU)
    assert models.student.training
    assert all(p.grad is None for p in models.student.parameters())


@pytest.fixture
def plain_teacher(world, tmp_path):
    """The teacher that needs <bos>, with a tokenizer that puts nothing before a text."""
    teacher = shutil.copytree(world / "needs", tmp_path / "teacher")
    tokenizer = write_tokenizer(tmp_path / "tokenizer", more=["<bos>", "<eos>"])
    shutil.copy(tokenizer / "tokenizer.json", teacher / "tokenizer.json")
    return teacher


def test_tokenizer_without_a_prefix_needs_no_measurement(world, plain_teacher, tmp_path, logged, monkeypatch):
    write_store(tmp_path / "plain", random_documents(40, seed=5), plain_teacher)
    monkeypatch.setattr(sequence_prefix, "measure_prefixes", lambda *_: pytest.fail("was measured"))
    words = [f"teacher.weights={plain_teacher}", f"data.train=[{tmp_path / 'plain'}]", "data.validation=null"]
    assert decide(world, *words) == ()
    assert not [m for m in logged.messages if m.startswith("prefix ")]


def test_document_prefix_is_measured_if_the_tokenizer_has_none(world, plain_teacher, logged):
    assert decide(world, f"teacher.weights={plain_teacher}") == (BOS,)
    assert any(m.startswith("prefix   '<bos>' (id 257): teacher's nll ") for m in logged.messages)


def test_corpus_without_cut_documents_is_not_measured(world, tmp_path, logged):
    documents = [[*range(1, 14)] for _ in range(20)]  # with <bos> and separator as long as a sequence behind its prefix
    store = write_store(tmp_path / "store", documents, world / "needs", prefix=(BOS,))
    assert store.num_tokens == 20 * 15
    assert decide(world, f"data.train=[{store.path}]") == ()
    assert logged.messages[-1] == "prefix   no prefix: no sequence of data.train begins inside a document"


def test_small_corpus_is_measured_on_fewer_sequences(world, tmp_path, logged):
    store = write_counting_store(tmp_path / "store", world / "needs", count=4)
    assert decide(world, f"data.train=[{store.path}]") == (BOS,)
    assert int(logged.messages[-1].split(" sequences that begin")[0].split()[-1]) < 64


def test_sequences_of_several_stores_are_those_that_the_run_draws_first_in_any_order_of_the_list(world, tmp_path):
    stores = [write_counting_store(tmp_path / str(n), world / "needs", count=40 + 9 * n) for n in range(3)]
    weights, packing, chosen = [0.5, 0.2, 0.3], PackingSpec(16, True, (BOS,)), []
    for listed in itertools.permutations(range(3)):
        mine, shares = [stores[place] for place in listed], [weights[place] for place in listed]
        places = sequence_prefix.sequences_inside(mine, packing, shares, 1)
        chosen.append([(listed[store], sequence) for store, sequence in places])
        run = StepLoader(mine, shares, packing=packing, shape=StepShape(1, 1), seed=1, prefetch=0)
        drawn = dict.fromkeys(run.keys.decode(int(next(run)[0].sample_ids)) for _ in range(1000))
        inside = {(str(mine[store].path), sequence) for store, sequence in places}
        assert [place for place in drawn if place in inside] == [(str(mine[s].path), k) for s, k in places]
    assert len({store for store, _ in chosen[0]}) == 3
    assert all(other == chosen[0] for other in chosen)


def test_data_ranks_measure_disjoint_shares(world):
    cfg = configured(world)
    (store,) = open_inputs(cfg, model_specs(cfg)).train
    packing = PackingSpec(16, True, (BOS,))
    places = sequence_prefix.sequences_inside([store], packing, None, 1)
    assert len(places) == 64
    keys = sequence_keys(store, packing)
    for ranks, most in ((1, 4), (3, 4), (5, 100), (64, 1), (100, 3)):
        shares = [
            list(sequence_prefix._batches([store], places, [(), (BOS,)], packing, most, Mesh(ranks, rank)))
            for rank in range(ranks)
        ]
        assert len({tuple(batch.input_ids.shape for forms in share for batch in forms) for share in shares}) == 1
        assert all(len(forms[0].sample_ids) <= most for share in shares for forms in share)
        for form in (0, 1):
            used = [
                int(sample)
                for share in shares
                for forms in share
                for sample, mask in zip(forms[form].sample_ids, forms[form].loss_mask, strict=True)
                if mask.any()
            ]
            assert sorted(used) == sorted(keys.key(sequence) for _, sequence in places)
        labels = [
            [batch.labels[batch.loss_mask > 0].tolist() for batch in forms] for share in shares for forms in share
        ]
        assert all(without == with_bos for without, with_bos in labels)


def test_unreadable_data_is_an_error_on_all_ranks(world, monkeypatch):
    cfg = configured(world)
    inputs = open_inputs(cfg, model_specs(cfg))
    monkeypatch.setattr(sequence_prefix, "gather_objects", lambda text, group: [text, "the other rank's disk"])
    with pytest.raises(DataError, match="the other rank's disk"):
        measure_prefixes(lambda batch: pytest.fail("measured"), [(), (BOS,)], inputs.train, cfg, Mesh(), CPU)


def choice(world, *words):
    cfg = configured(world, *words)
    return prefix_choice(cfg, open_inputs(cfg, model_specs(cfg)))


def test_check_line_states_what_a_run_will_decide(world):
    rivals = "no prefix, '<bos>' (id 257)"
    assert choice(world).line() == f"auto: a new run measures the teacher with {rivals} and takes the better"
    assert choice(world, "data.sequence_prefix=none").line() == (
        f"no prefix: a new run measures the teacher with {rivals} and refuses a worse choice"
    )
    alone = ("teacher.weights=null", "objective.name=pretrain")
    assert choice(world, *alone).line() is None
    assert choice(world, *alone, "data.sequence_prefix=<eos>").line() == "'<eos>' (id 258)"


def test_check_prints_the_prefix_and_refuses_what_a_run_refuses(world, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    words = [str(world / "run.yaml"), "--check"]
    assert run_training(parse(words, "")) == 0
    rivals = "a new run measures the teacher with no prefix, '<bos>' (id 257)"
    assert f"\nprefix   auto: {rivals} and takes the better\n" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data.sequence_prefix = <s>"):
        run_training(parse([*words, "data.sequence_prefix=<s>"], ""))
    evaluated = ["student.architecture=null", f"student.weights={world / 'needs'}", "data.sequence_prefix=<eos>"]
    assert run_evaluation(parse([*words, *evaluated], "")) == 0
    assert f"\nprefix   '<eos>' (id 258): {rivals}, '<eos>' (id 258) and refuses" in capsys.readouterr().out


def test_prefix_token_that_the_tokenizer_lacks_is_refused_by_name(world):
    with pytest.raises(ConfigError, match=r"data.sequence_prefix = <s>: .*tokenizer has no such token\n  fix: "):
        choice(world, "data.sequence_prefix=<s>")


def test_prefix_that_the_stores_lack_is_refused_unless_another_is_configured(world, monkeypatch):
    monkeypatch.setattr(sequence_prefix, "document_prefix", lambda folder: [BOS, VOCAB])
    with pytest.raises(StoreMismatch, match=r"puts the id 259 before sequences: the softmax of the run has 259 ids"):
        choice(world)
    assert choice(world, "data.sequence_prefix=none").rivals == [()]
    monkeypatch.setattr(sequence_prefix, "document_prefix", lambda folder: [BOS] * 16)
    with pytest.raises(ConfigError, match=r"data.seq_len = 16 leaves no room"):
        choice(world)


def test_prefix_without_a_row_or_of_another_token_is_refused_by_check_and_run(world, tmp_path, monkeypatch):
    folder = tmp_path / "teacher"
    shutil.copytree(world / "needs", folder)
    words = [f"teacher.weights={folder}", "run.name=b", "data.sequence_prefix=<eos>"]
    settings = json.loads((folder / "tokenizer.json").read_text())
    next(token for token in settings["added_tokens"] if token["content"] == "<eos>")["content"] = "<tool>"
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(StoreMismatch, match=rf"sequence_prefix = <eos> puts the id {EOS} .* calls it '<tool>'\n  why"):
        choice(world, *words)
    (folder / "tokenizer.json").write_text((world / "needs/tokenizer.json").read_text())
    monkeypatch.chdir(tmp_path)
    save_random(folder, tiny_config("qwen3", vocab_size=EOS))  # one row less than its tokenizer has ids
    for command in (["--check"], []):
        with pytest.raises(
            StoreMismatch, match=rf"sequence_prefix = <eos> puts the id {EOS} .* has rows for the ids below {EOS}"
        ):
            run_training(parse([str(world / "run.yaml"), *words, *command], ""))


@pytest.mark.parametrize(
    ("configured", "without", "with_bos", "taken"),
    [
        (None, 3.0, 3.0, ()),  # a prefix that changes nothing would only take room
        (None, 3.0, 2.999, (BOS,)),
        (None, math.nan, 3.0, (BOS,)),  # nan cannot be compared
        (None, math.nan, math.nan, ()),
        ((BOS,), 3.0, 3.04, (BOS,)),
        ((BOS,), 3.0, 3.06, None),
        ((), 3.04, 3.0, ()),
        ((), 3.06, 3.0, None),
        ((), math.nan, 3.0, None),
    ],
)
def test_explicit_prefix_may_be_worse_by_less_than_a_twentieth_of_a_nat(world, configured, without, with_bos, taken):
    found = sequence_prefix.Measured({(): without, (BOS,): with_bos}, 10, 2)
    choice = sequence_prefix.PrefixChoice(configured, (BOS,), "teacher", load_tokenizer(world / "needs"))
    if taken is not None:
        assert sequence_prefix._choose(RunConfig(), choice, found) == taken
        return
    with pytest.raises(ConfigError, match=rf"{without:.3f} with no prefix, {with_bos:.3f} with '<bos>'"):
        sequence_prefix._choose(RunConfig(), choice, found)


def test_export_records_the_prefix_of_its_run(tmp_path):
    assert exported_prefix(tmp_path) is None
    for note, prefix in (({"step": 3, "sequence_prefix": [BOS]}, (BOS,)), ({"step": 3}, ())):  # of before: none
        (tmp_path / "kdtrain.json").write_text(json.dumps(note))
        assert exported_prefix(tmp_path) == prefix
    (tmp_path / "kdtrain.json").write_text('{"step": 3,')
    with pytest.raises(ConfigError, match=r"kdtrain\.json is damaged: .*\n  fix: export the student again"):
        exported_prefix(tmp_path)
