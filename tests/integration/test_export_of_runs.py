"""Whole runs of students with padded head rows: transformers computes from the export what the run measured."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdtrain.data.loader import validation_batches
from kdtrain.data.packing import PackingSpec
from kdtrain.data.token_store import TokenStore
from kdtrain.models.tiny import save_random, tiny_config
from tests.support.launching import run_ranks
from tests.support.tiny_data import random_documents, write_store, write_tokenizer
from tests.support.tiny_run import write_run

TOKENS, ROWS = 258, 304
pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Stores and an instruct teacher of 258 tokens, base students of 304 rows, a teacher with two tokens more."""
    folder = tmp_path_factory.mktemp("world")
    sections = {"data": {"validation": str(folder / "validation")}, "checkpoint": {"export": True}}
    write_run(folder, student=tiny_config("llama"), teacher=tiny_config("llama"), steps=6, **sections)
    for name, more in (("instruct", ["<|im_end|>"]), ("larger", ["<|im_end|>", "<tool>", "<think>"])):
        teacher = write_tokenizer(folder / name, more=more, eos="<|im_end|>")
        (teacher / "chat_template.jinja").write_text("{{ messages }}")
        save_random(teacher, tiny_config("llama", vocab_size=272))
    for name, seed, made_with in (
        ("train", 0, "instruct"),
        ("train_larger", 0, "larger"),
        ("validation", 1, "instruct"),
    ):
        write_store(folder / name, random_documents(200, seed=seed), folder / made_with)
    for name, tied in (("tied", True), ("untied", False)):
        student = write_tokenizer(folder / name, more=["<|im_end|>"], eos="<|endoftext|>")
        save_random(student, tiny_config("qwen3", vocab_size=ROWS, tie_word_embeddings=tied), seed=5)
    return folder


def settings(world, student, teacher, store="train"):
    names = (f"student.weights={student}", f"teacher.weights={teacher}", f"data.train=[{world / store}]")
    return (world / "config.yaml", "run.name=evaluated", "student.architecture=null", *names)


def trained(world, name, student, *words, teacher="instruct", store="train", tp=1):
    models = settings(world, world / student, world / teacher, store)
    run_ranks("train.py", *models, f"run.name={name}", f"parallel.tp={tp}", *words, ranks=tp)
    return world / "runs" / name


def measured(run):
    """The last evaluation."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "eval/val_nll" in record][-1]


@torch.no_grad()
def stock_nll(folder, store):
    """Cross-entropy in float32 over all rows of the folder's model, in nats per valid token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = count = 0.0
    for batch in validation_batches(TokenStore.open(store), packing=PackingSpec(16), sequences_per_batch=8):
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        labels = batch.labels.masked_fill(batch.loss_mask == 0, -100)
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize(
    ("student", "tp", "z_loss"), [("untied", 1, 0.01), ("tied", 2, 0.01), ("untied", 2, 0.0), ("tied", 1, 0.0)]
)
def test_export_has_the_nll_that_the_run_measured(world, student, tp, z_loss):
    words = (f"objective.z_loss={z_loss}", "optim.lr=0.01")
    run = trained(world, f"{student}_{tp}", student, *words, tp=tp)
    wanted = measured(run)["eval/val_nll"]
    assert stock_nll(run / "export", world / "validation") == pytest.approx(wanted, abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    assert model.config.vocab_size == TOKENS
    torch.manual_seed(0)
    sampled = model.generate(torch.ones(8, 1, dtype=torch.int64), max_new_tokens=25, do_sample=True, pad_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert all(tokenizer.convert_ids_to_tokens(row.tolist()).count(None) == 0 for row in sampled)
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|endoftext|>", None), "the teacher's were exported"


@pytest.mark.parametrize("store", ["train", "train_larger"])
def test_export_of_student_with_fewer_tokens_than_its_teacher_loads_as_student_and_teacher(world, store):
    run = trained(world, store, "untied", "objective.z_loss=0.01", teacher="larger", store=store)
    wanted, export = measured(run), run / "export"
    assert stock_nll(export, world / "validation") == pytest.approx(wanted["eval/val_nll"], abs=1e-4)
    words = settings(world, export, world / "larger", store)
    found = json.loads(run_ranks("eval_model.py", *words).out.splitlines()[-1])
    for key in ("eval/val_nll", "eval/kl_to_teacher", "eval/teacher_nll"):
        assert found[key] == pytest.approx(wanted[key], abs=1e-4), key
    found = json.loads(run_ranks("eval_model.py", *settings(world, world / "tied", export, store)).out.splitlines()[-1])
    assert found["eval/teacher_nll"] == pytest.approx(wanted["eval/val_nll"], abs=1e-4)
    run_ranks("export_hf.py", run, world / f"by_script_{store}")  # in the dtype of the run, as RUN/export
    assert (world / f"by_script_{store}/model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()
