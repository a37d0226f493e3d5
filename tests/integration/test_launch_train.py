"""A whole run through the deepspeed launcher: train, stop, resume bitwise, evaluate, export, and refuse bad input."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.model_folders import edit_tensors

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.deepspeed


def environment():
    paths = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def script(name, *words):
    command = [sys.executable, str(ROOT / "launch" / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=250, check=False)


def launcher(*words, ranks=2):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    tool = Path(sys.executable).with_name("deepspeed")
    return [
        sys.executable,
        str(tool),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(port),
        str(ROOT / "launch/train.py"),
        *map(str, words),
    ]


def deepspeed(*words, ranks=2):
    return subprocess.run(
        launcher(*words, ranks=ranks), capture_output=True, text=True, env=environment(), timeout=280, check=False
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Text, a byte-pair tokenizer trained on it, stores made by the script, a random teacher folder, a config."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM

    from kdtrain.models.tiny import tiny_config

    folder = tmp_path_factory.mktemp("world")
    texts = [p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").rglob("*.md"))]
    with (folder / "text.jsonl").open("w") as file:
        for text in texts:
            for part in text.split("\n\n"):
                file.write(json.dumps({"text": part}) + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=389, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    teacher = folder / "teacher"
    settings = tiny_config("smollm", vocab_size=389, max_position_embeddings=64)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(teacher)
    tokenizer.save(str(teacher / "tokenizer.json"))
    (teacher / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    student = folder / "student.json"
    student.write_text(json.dumps(tiny_config("qwen3", max_position_embeddings=64, tie_word_embeddings=True)))
    done = script(
        "prepare_corpus.py",
        "--tokenizer",
        teacher,
        "--output",
        folder / "data",
        "--validation-share",
        0.1,
        "--workers",
        1,
        "--inner-separators",
        "keep",
        folder / "text.jsonl",
    )
    assert done.returncode == 0, done.stderr
    (folder / "config.yaml").write_text(
        f"""
run: {{name: run, output_dir: {folder}/runs}}
student: {{architecture: {student}, dtype: float32}}
teacher: {{weights: {teacher}, dtype: float32}}
data:
  train: [{folder}/data/train]
  validation: {folder}/data/validation
  seq_len: 32
  tokens_per_step: 256
  sequences_per_micro_batch: 4
objective: {{name: distill, distill: {{kd_weight: 0.7, temperature: 2.0}}}}
parallel: {{tp: 2}}
train: {{total_tokens: 2048, slab_bytes: 1048576}}
schedule: {{warmup_tokens: 512}}
eval: {{every_steps: 4, max_tokens: 512}}
log: {{every_steps: 1}}
debug: {{self_check: false}}
"""
    )
    return folder


@pytest.fixture(scope="module")
def finished(world):
    done = deepspeed(world / "config.yaml", "run.name=whole")
    assert done.returncode == 0, done.stdout + done.stderr
    return world / "runs/whole", done.stdout


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clock(run):
    volatile = ("time/", "throughput/", "memory/")
    return [{k: v for k, v in r.items() if not k.startswith(volatile)} for r in records(run)]


def test_a_run_through_the_launcher_ends_with_everything_in_its_folder(finished):
    run, out = finished
    assert "mesh     2 ranks = dp 1 x tp 2" in out
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "STATUS", "export", "checkpoints"} <= names
    assert (run / "STATUS").read_text().startswith("done")
    evals = [r for r in records(run) if "eval/val_nll" in r]
    assert [r["data/step"] for r in evals] == [0, 4, 8]
    assert evals[-1]["eval/val_nll"] < evals[0]["eval/val_nll"]
    assert evals[-1]["eval/kl_to_teacher"] < evals[0]["eval/kl_to_teacher"]


def test_the_export_gives_the_logits_of_the_checkpoint(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kdtrain.engine.checkpoint import find_latest, read_full_parameters

    run, _ = finished
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    ids = torch.tensor([tokenizer("A store describes itself.")["input_ids"]])
    exported = model(ids).logits
    state = dict(read_full_parameters(find_latest(run / "checkpoints")))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    torch.testing.assert_close(model(ids).logits, exported, rtol=1e-5, atol=1e-5)


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(world, finished):
    whole, _ = finished
    words = (world / "config.yaml", "run.name=parts", "train.total_tokens=2048")
    first = deepspeed(*words, "run.time_limit_s=0.001", "checkpoint.every_steps=3")
    assert first.returncode == 75, first.stdout + first.stderr
    assert status(world / "runs/parts") == ("stopped", "RunStopped: stopped at step 0 (run.time_limit_s reached)")
    process = subprocess.Popen(
        launcher(*words, "checkpoint.every_steps=3"), env=environment(), stdout=subprocess.PIPE, text=True
    )
    signalled = 0
    for line in process.stdout:
        if line.startswith("step") and not signalled:
            assert int(line.split()[1].split("/")[0]) == 1
            ranks = [p for p in _descendants(process.pid) if "--local_rank" in _command(p)]
            for pid in ranks:
                os.kill(pid, signal.SIGTERM)
            signalled += len(ranks)
    assert signalled == 2
    assert process.wait(timeout=120) == 75
    state, reason = status(world / "runs/parts")
    assert (state, "SIGTERM" in reason or "another rank" in reason) == ("stopped", True)
    (saved,) = (int(p.name[5:]) for p in (world / "runs/parts/checkpoints").iterdir() if p.name != "step_000000")
    assert 0 < saved < 8
    last = deepspeed(*words)
    assert last.returncode == 0, last.stdout + last.stderr
    assert f"resumed {saved:6d}  from" in last.stdout
    assert without_clock(world / "runs/parts") == without_clock(whole)
    from safetensors.torch import load_file

    a = load_file(whole / "export/model.safetensors")
    b = load_file(world / "runs/parts/export/model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


def status(run):
    from kdtrain.run_state.run_folder import read_status

    state, reason = read_status(run)
    return state, reason.partition(";")[0]


def test_dropout_is_the_same_after_a_resume(world):
    """Masks come from (run.seed, step, data rank): no random state is saved, and two runs of one seed are one run."""
    from kdtrain.models.tiny import tiny_config

    config = tiny_config("gpt_neox", vocab_size=389, max_position_embeddings=64, hidden_dropout=0.3)
    student = world / "dropout.json"
    student.write_text(json.dumps(config))

    def train(name, tokens):
        done = script(
            "train.py",
            world / "config.yaml",
            f"student.architecture={student}",
            "parallel.tp=1",
            f"run.name={name}",
            f"train.total_tokens={tokens}",
            "schedule.shape=constant",
            "checkpoint.export=false",
        )
        assert done.returncode == 0, done.stderr
        return records(world / "runs" / name)

    whole, _, resumed = train("drop", 1024), train("dropped", 512), train("dropped", 1024)
    losses = [{r["data/step"]: r["loss/total"] for r in run if "loss/total" in r} for run in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_a_longer_run_exports_the_longer_trained_student(world, finished):
    whole, _ = finished
    run = world / "runs/longer"
    shutil.copytree(whole, run)
    before = (run / "export/model.safetensors").read_bytes()
    words = (world / "config.yaml", "run.name=longer", "parallel.tp=1", "eval.every_steps=100")
    done = script("train.py", *words, "train.total_tokens=2560")
    assert done.returncode == 0, done.stderr
    assert "changed since step_000008 was written: train.total_tokens: 2048 -> 2560" in done.stdout + done.stderr
    assert (run / "export/model.safetensors").read_bytes() != before
    assert json.loads((run / "export/kdtrain.json").read_text())["step"] == 10
    kept = (run / "config.yaml").read_text()
    done = script("train.py", *words, "student.architecture=" + str(world / "dropout.json"))
    assert done.returncode == 3, done.stdout + done.stderr
    assert "holds another model than this run trains" in done.stderr
    assert (run / "config.yaml").read_text() == kept, "a refused resume changed the folder"


def _descendants(pid):
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *_descendants(int(child))]
    return found


def _command(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def test_one_process_without_a_launcher_trains_the_same_student(world, finished):
    whole, _ = finished
    done = script("train.py", world / "config.yaml", "run.name=alone", "parallel.tp=1", "checkpoint.export=false")
    assert done.returncode == 0, done.stdout + done.stderr
    for mine, theirs in zip(records(world / "runs/alone"), records(whole), strict=True):
        for key in ("loss/total", "optim/grad_norm", "eval/val_nll", "eval/kl_to_teacher"):
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=2e-4), (key, theirs["data/step"])


def test_an_export_can_be_evaluated_by_itself(world, finished):
    run, _ = finished
    words = ("eval_model.py", world / "config.yaml", "student.architecture=null", f"student.weights={run / 'export'}")
    done = script(*words, "parallel.tp=1")
    assert done.returncode == 0, done.stderr
    means = json.loads(done.stdout.splitlines()[-1])
    assert means["eval/val_nll"] == pytest.approx(records(run)[-1]["eval/val_nll"], rel=1e-4)
    done = script(*words, "parallel.tp=1", "--check")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "check    passed"
    assert "eval/" not in done.stdout


def test_check_says_what_would_run_and_starts_nothing(world):
    done = script("train.py", world / "config.yaml", "run.name=never", "parallel.tp=1", "--check")
    assert done.returncode == 0, done.stderr
    assert "memory   estimate" in done.stdout
    assert "check    passed" in done.stdout
    assert not (world / "runs/never").exists()


@pytest.mark.parametrize("case", ["a quantised teacher", "another data order"])
def test_check_and_run_refuse_with_the_same_words_and_code(world, finished, tmp_path, case):
    if case == "a quantised teacher":
        shutil.copytree(world / "teacher", tmp_path / "teacher")
        edit_tensors(tmp_path / "teacher", lambda t: t.update({name: x.to(torch.int8) for name, x in t.items()}))
        words, code, said = [f"teacher.weights={tmp_path / 'teacher'}", "run.name=int8"], 2, "is stored as I8"
    else:
        shutil.copytree(finished[0], world / "runs/reseeded")
        words, code, said = (
            ["run.seed=7", "run.name=reseeded"],
            3,
            "data order differs in run.seed: 1 in the checkpoint",
        )
    words = [world / "config.yaml", "parallel.tp=1", *words]
    for done in (script("train.py", *words, "--check"), script("train.py", *words)):
        assert done.returncode == code, done.stdout + done.stderr
        assert said in done.stderr


def test_a_truncated_store_is_refused_by_name_with_code_3(world, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(world / "data/train", store)
    path = store / "shard_00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    done = script("train.py", world / "config.yaml", "parallel.tp=1", f"data.train=[{store}]", "run.name=broken")
    assert done.returncode == 3
    assert f"{path} is truncated" in done.stderr
    assert not (world / "runs/broken").exists()


def test_a_teacher_with_another_tokenizer_is_refused_with_both_ids(world, tmp_path):
    other = tmp_path / "teacher"
    shutil.copytree(world / "teacher", other)
    found = json.loads((other / "tokenizer.json").read_text())
    found["model"]["merges"] = found["model"]["merges"][:-40]
    (other / "tokenizer.json").write_text(json.dumps(found))
    done = script("train.py", world / "config.yaml", "parallel.tp=1", f"teacher.weights={other}", "run.name=odd")
    assert done.returncode == 3
    assert "another tokenizer than the teacher's" in done.stderr


def test_neither_the_teachers_layout_nor_what_saves_memory_changes_anything(world, finished):
    whole, _ = finished
    done = deepspeed(
        world / "config.yaml",
        "run.name=cut",
        "teacher.layout=tp",
        "debug.check_replicas=true",
        "teacher.overlap=true",
        "teacher.max_tokens_per_forward=64",
        "zero.offload_optimizer=true",
    )
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(records(world / "runs/cut"), records(whole), strict=True):
        for key in ("loss/total", "loss/kd", "optim/grad_norm", "eval/kl_to_teacher"):
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4), (key, theirs["data/step"])


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_a_quantised_teacher_says_what_it_costs_and_teaches_nearly_the_same(world, finished):
    whole, _ = finished
    words = ("run.name=int8", "parallel.tp=1", "teacher.quantize=int8", "checkpoint.export=false")
    done = script("train.py", world / "config.yaml", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"teacher  int8: KL to its float32 self (\S+) nats/token over (\d+) tokens, weights", done.stdout)
    assert 0 < float(found[1]) < 0.01
    assert 0 < int(found[2]) <= 4 * 32
    assert "frozen, plain, int8 weights" in done.stdout
    for mine, theirs in zip(records(world / "runs/int8"), records(whole), strict=True):
        if "loss/kd" in theirs:
            assert mine["loss/kd"] != theirs["loss/kd"]
            assert mine["loss/kd"] == pytest.approx(theirs["loss/kd"], rel=0.05)


def test_a_mixture_of_experts_teaches_in_two_layouts_alike(world):
    from kdtrain.models.tiny_mixtures import write_mixture

    teacher = world / "mixture"
    write_mixture(teacher, "qwen3_moe", packed=False, vocab_size=389, max_position_embeddings=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(world / "teacher" / name, teacher / name)
    words = [world / "config.yaml", f"teacher.weights={teacher}", "train.total_tokens=1024", "checkpoint.export=false"]
    alone = ["run.name=mixture_1", "parallel.tp=1", "teacher.zero_stage=3"]
    checked = script("train.py", *words, *alone, "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for done, layout in (
        (script("train.py", *words, *alone), "plain x zero 3"),
        (deepspeed(*words, "run.name=mixture_2", "teacher.layout=tp", "debug.check_replicas=true"), "tp 2"),
    ):
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(rf"teacher .* 130,304 parameters \(61,184 per token\), frozen, {layout}", done.stdout)
    for mine, theirs in zip(records(world / "runs/mixture_1"), records(world / "runs/mixture_2"), strict=True):
        for key in ("loss/total", "loss/kd", "optim/grad_norm", "eval/kl_to_teacher"):
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4), (key, theirs["data/step"])


OWN_RANK = ("teacher.layout=dedicated", "teacher.ranks=1")


def test_a_dedicated_teacher_changes_nothing_and_a_signal_to_it_stops_the_run(world, finished):
    """Stopped through its teacher, then resumed with another number of the student's ranks."""
    whole, _ = finished
    words = (world / "config.yaml", "run.name=own", *OWN_RANK)
    process = subprocess.Popen(
        launcher(*words, "parallel.tp=1", ranks=2), env=environment(), stdout=subprocess.PIPE, text=True
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("teacher  1 on ranks [1], ready"):  # not later: eight steps are over at once
            (teacher,) = (p for p in _descendants(process.pid) if "--local_rank=1" in _command(p))
            os.kill(teacher, signal.SIGTERM)
    assert process.wait(timeout=120) == 75, "".join(said)
    run = world / "runs/own"
    state, reason = status(run)
    assert state == "stopped"
    assert "a rank of the dedicated teacher received a stop request" in reason
    done = deepspeed(*words, ranks=3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mesh     2 ranks = dp 1 x tp 2" in done.stdout
    assert "teacher  1 on ranks [2], ready" in done.stdout
    assert "changed since" not in done.stdout, "where the teacher lives is no change of what is learned"
    for mine, theirs in zip(records(run), records(whole), strict=True):
        for key in ("loss/total", "loss/kd", "optim/grad_norm", "eval/val_nll", "eval/kl_to_teacher"):
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=2e-4), (key, theirs["data/step"])
    assert (run / "export/model.safetensors").is_file()
    beats = {path.name: json.loads(path.read_text()) for path in (run / "heartbeat").iterdir()}
    assert beats["rank_00002"]["done"] == "teacher"


def test_a_dedicated_teacher_that_lacks_a_tensor_ends_all_ranks_with_its_name(world, tmp_path):
    """Every rank reads the headers of all its files, those of the student too, which read nothing but the head."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "teacher"
    shutil.copytree(world / "teacher", broken)
    tensors = load_file(broken / "model.safetensors")
    lost = next(name for name in tensors if "mlp" in name)
    save_file({name: t for name, t in tensors.items() if name != lost}, broken / "model.safetensors")
    started = time.monotonic()
    done = deepspeed(world / "config.yaml", "parallel.tp=1", "run.name=lost", *OWN_RANK, f"teacher.weights={broken}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"kdtrain: {broken} has no tensor for parameter {lost!r}" in done.stderr
    assert f"the teacher on rank 1 cannot be loaded: {broken} has no tensor" in done.stderr, "students may be busy"
    assert status(world / "runs/lost")[0] == "failed"
    assert time.monotonic() - started < 100


def test_a_misspelt_key_ends_in_code_2_before_torch_is_imported(world):
    started = time.monotonic()
    done = script("train.py", world / "config.yaml", "objective.distil.kd_weight=1")
    assert done.returncode == 2
    assert "Did you mean" in done.stderr or "did you mean" in done.stderr.lower()
    assert time.monotonic() - started < 60
