"""run.continue_from: a second stage of training with the optimizer's state of the first and other data."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kdtrain.config.load import load_run
from kdtrain.data.loader import StepLoader, StepShape
from kdtrain.data.packing import PackingSpec
from kdtrain.data.token_store import TokenStore
from kdtrain.engine import checkpoint
from kdtrain.engine.manifest import KINDS
from kdtrain.engine.slices import CheckpointReader
from kdtrain.jobs.build.loop import loop_settings
from kdtrain.models.tiny import tiny_config
from kdtrain.telemetry.jsonl_sink import read_records
from tests.support.launching import run_ranks
from tests.support.tiny_data import random_documents, write_store
from tests.support.tiny_run import TOKENS_PER_STEP, write_run

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]
STEPS = 2
"""Of the first stage."""


def start(config, *words, ranks=1, code=0):
    """A run all of whose ranks exit with `code`; what rank 0 wrote."""
    ended = run_ranks("train.py", config, *words, ranks=ranks, code=code)
    return ended.out + ended.err


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished first stage: (its configuration file, its run folder)."""
    folder = tmp_path_factory.mktemp("stages")
    config = write_run(folder, student=tiny_config("smollm"), steps=STEPS, data={"reset_positions": False})
    write_store(folder / "other", random_documents(200, seed=9), folder / "teacher")
    start(config, "run.name=first")
    return config, folder / "runs/first"


def stage_words(first, name, *more):
    config, source = first
    data = [f"data.train=[{config.parent / 'other'}]", "data.seq_len=8", f"train.total_tokens={4 * TOKENS_PER_STEP}"]
    schedule = ["schedule.shape=linear", "schedule.warmup_tokens=0", "optim.lr=2e-3", "optim.betas=[0.8, 0.9]"]
    return [f"run.name={name}", f"run.continue_from={source}", *data, *schedule, "checkpoint.keep_last=9", *more]


@pytest.fixture(scope="module")
def second(first):
    """A finished second stage of four steps on another store: (its run folder, what it printed, its command line)."""
    config, source = first
    words = stage_words(first, "second", "checkpoint.export=true")
    return source.parent / "second", start(config, *words), words


def tensors(folder):
    """name -> its float32 weight and moments, whole; and name -> AdamW's step count."""
    with CheckpointReader(folder) as reader:
        found = {name: {kind: reader.read_full(name, kind) for kind in KINDS} for name in reader.names()}
        return found, {name: entry.adam_step for name, entry in reader.manifest.parameters.items()}


def loss_and_gradients(folder, batch):
    """Mean cross-entropy of the checkpoint's student on a batch, by stock transformers, and its gradients."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values, _ = tensors(folder)
    config = checkpoint.read_config(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    params = dict(model.named_parameters())
    assert params.keys() == values.keys()
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(values[name]["master"])
    logits = model(input_ids=batch.input_ids).logits[..., :257].flatten(0, 1)
    losses = F.cross_entropy(logits, batch.labels.flatten(), reduction="none") * batch.loss_mask.flatten()
    mean = losses.sum() / batch.loss_mask.sum()
    mean.backward()
    return float(mean.detach()), params


def adamw_by_hand(folder, params, cfg):
    """The checkpoint's weights and moments after one more step of torch's AdamW with these gradients."""
    values, steps = tensors(folder)
    torch.nn.utils.clip_grad_norm_(params.values(), cfg.optim.grad_clip)
    decay = {2: cfg.optim.weight_decay, 1: 0.0}
    groups = [{"params": [param], "weight_decay": decay[param.dim()]} for param in params.values()]
    lr = loop_settings(cfg).learning_rate(TOKENS_PER_STEP)
    adamw = torch.optim.AdamW(groups, lr=lr, betas=cfg.optim.betas, eps=cfg.optim.eps)
    for name, param in params.items():
        state = {kind: values[name][kind].clone() for kind in KINDS[1:]}
        adamw.state[param] = {"step": torch.tensor(float(steps[name])), **state}
    adamw.step()
    return {name: {"master": p.detach(), **{k: adamw.state[p][k] for k in KINDS[1:]}} for name, p in params.items()}


def first_batch(cfg, position=0):
    sequences = cfg.data.tokens_per_step // cfg.data.seq_len
    packing = PackingSpec(cfg.data.seq_len, reset_positions=False)
    stores = [TokenStore.open(path) for path in cfg.data.train]
    shape = StepShape(sequences, sequences)
    loader = StepLoader(stores, packing=packing, shape=shape, seed=cfg.run.seed, prefetch=0)
    loader.seek(position)
    return next(loader)[0]


def test_first_update_of_a_stage_uses_moments_and_step_counts_of_the_former(first, second):
    source, cfg = first[1] / f"checkpoints/step_{STEPS:06d}", load_run([str(first[0]), *second[2]]).config
    loss, params = loss_and_gradients(source, first_batch(cfg))
    wanted = adamw_by_hand(source, params, cfg)
    found, steps = tensors(second[0] / "checkpoints/step_000001")
    assert set(steps.values()) == {STEPS + 1}
    for name, values in wanted.items():
        for kind, tensor in values.items():
            torch.testing.assert_close(found[name][kind], tensor, rtol=2e-5, atol=1e-8, msg=f"{kind} of {name}")
    records = read_records(second[0] / "metrics.jsonl")
    assert [record["data/step"] for record in records] == [1, 2, 3, 4]
    assert [record["data/tokens_seen"] for record in records] == [128, 256, 384, 512]
    assert records[0]["loss/ce"] == pytest.approx(loss, abs=1e-5)
    rate = loop_settings(cfg).learning_rate
    assert [r["optim/lr"] for r in records] == pytest.approx([rate(128 * n) for n in (1, 2, 3, 4)])
    assert records[-1]["optim/lr"] == pytest.approx(2e-4), "the stage's own schedule, to its own end"


def test_console_lists_what_a_stage_takes_resets_and_changes(first, second):
    output = second[1]
    assert (
        f"stage    from {first[1]}/checkpoints/step_{STEPS:06d} (step {STEPS}, 256 tokens): took weights, AdamW's "
        "moments and step counts; steps, tokens, learning-rate schedule and data position begin at 0"
    ) in output
    assert f"changed since step_{STEPS:06d} was written: optim.betas: [0.9, 0.95] -> [0.8, 0.9]" in output
    assert f"changed since step_{STEPS:06d} was written: optim.lr: " in output
    assert "written: data." not in output
    assert "store    " in output
    assert " sequences, 64 drawn, " in output


def test_stage_on_the_same_store_starts_at_its_first_sequence(first):
    config, source = first
    words = ["run.name=again", f"run.continue_from={source}", f"train.total_tokens={TOKENS_PER_STEP}"]
    words += ["schedule.warmup_tokens=0"]
    start(config, *words)
    folder, cfg = source / f"checkpoints/step_{STEPS:06d}", load_run([str(config), *words]).config
    (record,) = read_records(source.parent / "again/metrics.jsonl")
    begin, _ = loss_and_gradients(folder, first_batch(cfg))
    where_it_stopped, _ = loss_and_gradients(folder, first_batch(cfg, STEPS * TOKENS_PER_STEP // 16))
    assert record["loss/ce"] == pytest.approx(begin, abs=1e-5)
    assert abs(record["loss/ce"] - where_it_stopped) > 1e-3
    state = checkpoint.read_state(source.parent / "again/checkpoints/step_000001")
    assert state["loader"]["sequences"] == TOKENS_PER_STEP // 16


def test_stage_resumes_bitwise_by_the_same_command_and_ends_once(first, second, tmp_path):
    folder, _, words = second
    shutil.copytree(folder, tmp_path / "second", ignore=shutil.ignore_patterns("step_000003", "step_000004", "export"))
    assert "resumed      2  from" in start(first[0], *words, f"run.output_dir={tmp_path}")
    file = "checkpoints/step_000004/rank_00000.safetensors"
    assert (tmp_path / "second" / file).read_bytes() == (folder / file).read_bytes()
    resumed, whole = (read_records(run / "metrics.jsonl") for run in (tmp_path / "second", folder))
    assert [record["loss/ce"] for record in resumed] == [record["loss/ce"] for record in whole]
    output = start(first[0], *words, f"run.output_dir={tmp_path}")
    assert "is where this run began; it continues from its own step_000004" in output


def test_stage_starts_bitwise_in_another_layout(first, second):
    config, source = first
    words = stage_words(first, "cut", "parallel.tp=2", "zero.stage=2", "parallel.world_size=2")
    start(config, *words, "run.time_limit_s=0.001", ranks=2, code=75)  # saves before the first step
    before = tensors(source / f"checkpoints/step_{STEPS:06d}")
    after = tensors(source.parent / "cut/checkpoints/step_000000")
    assert before[1] == after[1]
    assert all(torch.equal(after[0][name][kind], before[0][name][kind]) for name in before[0] for kind in KINDS)
    start(config, *words, ranks=2)
    found, steps = tensors(source.parent / "cut/checkpoints/step_000001")
    wanted, _ = tensors(second[0] / "checkpoints/step_000001")
    assert set(steps.values()) == {STEPS + 1}
    for name, values in wanted.items():
        for kind, tensor in values.items():
            torch.testing.assert_close(found[name][kind], tensor, rtol=2e-5, atol=1e-8, msg=f"{kind} of {name}")


def test_export_of_a_stage_names_its_source(first, second):
    from transformers import AutoModelForCausalLM

    folder = second[0]
    about = json.loads((folder / "export/kdtrain.json").read_text())
    source = about["continued_from"]
    assert (about["step"], source["step"], source["tokens_seen"]) == (4, STEPS, STEPS * TOKENS_PER_STEP)
    assert source["path"] == str(first[1] / f"checkpoints/step_{STEPS:06d}")
    assert source["id"] == checkpoint.identity(Path(source["path"]))
    exported = dict(AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32).named_parameters())
    values, _ = tensors(folder / "checkpoints/step_000004")
    assert all(torch.equal(exported[name], entry["master"]) for name, entry in values.items())


def test_check_of_a_stage_refuses_what_its_start_refuses(first, second):
    config, source = first
    words = stage_words(first, "checked", "--check")
    assert "check    passed" in start(config, *words)
    assert "another model than this run trains" in start(config, *words, "student.architecture=llama-5m", code=3)
    assert not (source.parent / "checked").exists()
    output = start(config, *stage_words(first, "first", "--check"), code=2)
    assert "this run folder holds" in output
