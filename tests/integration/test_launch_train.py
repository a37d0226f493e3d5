"""A whole run through the deepspeed launcher: train, stop, resume bitwise, evaluate, export, and refuse bad input."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.launch_world import MODEL, write_world
from tests.support.launching import (
    ROOT,
    deepspeed_command,
    end_ranks,
    environment,
    numbers_of,
    read_metrics,
    read_status,
    run_command,
    run_ranks,
    start_ranks,
)
from tests.support.model_folders import edit_tensors

pytestmark = pytest.mark.deepspeed


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture(scope="module")
def finished(world):
    done = run_command(*deepspeed_command(world / "config.yaml", "run.name=whole"))
    assert done.code == 0, done.out + done.err
    return world / "runs/whole", done.out


def train(world, name, *words, ranks=1, code=0):
    """A run of launch/train.py; tp follows the number of ranks."""
    tp = f"parallel.tp={ranks}"
    return run_ranks("train.py", world / "config.yaml", tp, f"run.name={name}", *words, ranks=ranks, code=code)


def assert_same_numbers(run, other, keys, rel):
    for mine, theirs in zip(read_metrics(run), read_metrics(other), strict=True):
        for key in keys:
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=rel), (key, theirs["data/step"])


def test_finished_run_has_all_its_files_and_has_learned(finished):
    run, out = finished
    assert "mesh     2 ranks = dp 1 x tp 2" in out
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "STATUS", "export", "checkpoints"} <= names
    assert (run / "STATUS").read_text().startswith("done")
    evals = [r for r in read_metrics(run) if "eval/val_nll" in r]
    assert [r["data/step"] for r in evals] == [0, 4, 8]
    assert evals[-1]["eval/val_nll"] < evals[0]["eval/val_nll"]
    assert evals[-1]["eval/kl_to_teacher"] < evals[0]["eval/kl_to_teacher"]


def test_export_gives_the_logits_of_the_checkpoint(finished):
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


def descendants(pid):
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def test_stopped_and_resumed_run_is_bitwise_the_uninterrupted_one(world, finished):
    """Stopped by its time limit, then by SIGTERM to every rank under the launcher."""
    whole, _ = finished
    run = world / "runs/parts"
    train(world, "parts", "run.time_limit_s=0.001", "checkpoint.every_steps=3", ranks=2, code=75)
    assert read_status(run) == ("stopped", "RunStopped: stopped at step 0 (run.time_limit_s reached)")
    command = deepspeed_command(world / "config.yaml", "run.name=parts", "checkpoint.every_steps=3")
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    signalled = 0
    for line in process.stdout:
        if line.startswith("step") and not signalled:
            assert int(line.split()[1].split("/")[0]) == 1
            ranks = [p for p in descendants(process.pid) if "--local_rank" in command_of(p)]
            for pid in ranks:
                os.kill(pid, signal.SIGTERM)
            signalled += len(ranks)
    assert signalled == 2
    assert process.wait(timeout=120) == 75
    state, reason = read_status(run)
    assert (state, "SIGTERM" in reason or "another rank" in reason) == ("stopped", True)
    (saved,) = (int(p.name[5:]) for p in (run / "checkpoints").iterdir() if p.name != "step_000000")
    assert 0 < saved < 8
    last = train(world, "parts", ranks=2)
    assert f"resumed {saved:6d}  from" in last.out
    assert numbers_of(run) == numbers_of(whole)
    from safetensors.torch import load_file

    a = load_file(whole / "export/model.safetensors")
    b = load_file(run / "export/model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_dropout_is_the_same_after_a_resume(world):
    """Masks come from (run.seed, step, data rank): no random state is saved, and two runs of one seed are one run."""
    from kdtrain.models.tiny import tiny_config

    student = world / "dropout.json"
    student.write_text(json.dumps(tiny_config("gpt_neox", hidden_dropout=0.3, **MODEL)))

    def losses(name, tokens):
        words = (f"student.architecture={student}", f"train.total_tokens={tokens}", "schedule.shape=constant")
        train(world, name, *words, "checkpoint.export=false")
        return {r["data/step"]: r["loss/total"] for r in read_metrics(world / "runs" / name) if "loss/total" in r}

    whole, _, resumed = losses("drop", 1024), losses("dropped", 512), losses("dropped", 1024)
    assert whole == resumed
    assert len(whole) == 4


def test_longer_run_exports_the_longer_trained_student_and_refuses_another_model(world, finished):
    whole, _ = finished
    run = world / "runs/longer"
    shutil.copytree(whole, run)
    before = (run / "export/model.safetensors").read_bytes()
    done = train(world, "longer", "eval.every_steps=100", "train.total_tokens=2560")
    assert "changed since step_000008 was written: train.total_tokens: 2048 -> 2560" in done.out + done.err
    assert (run / "export/model.safetensors").read_bytes() != before
    assert json.loads((run / "export/kdtrain.json").read_text())["step"] == 10
    kept = (run / "config.yaml").read_text()
    other = world / "teacher/config.json"
    done = train(world, "longer", "eval.every_steps=100", f"student.architecture={other}", code=3)
    assert "holds another model than this run trains" in done.err
    assert (run / "config.yaml").read_text() == kept, "a refused resume changed the folder"


def test_one_process_without_a_launcher_trains_the_same_student(world, finished):
    train(world, "alone", "checkpoint.export=false")
    keys = ("loss/total", "optim/grad_norm", "eval/val_nll", "eval/kl_to_teacher")
    assert_same_numbers(world / "runs/alone", finished[0], keys, rel=2e-4)


def test_export_evaluates_to_the_numbers_of_its_run(world, finished):
    run, _ = finished
    words = ("student.architecture=null", f"student.weights={run / 'export'}", "parallel.tp=1")
    done = run_ranks("eval_model.py", world / "config.yaml", *words)
    means = json.loads(done.out.splitlines()[-1])
    assert means["eval/val_nll"] == pytest.approx(read_metrics(run)[-1]["eval/val_nll"], rel=1e-4)
    done = run_ranks("eval_model.py", world / "config.yaml", *words, "--check")
    assert done.out.splitlines()[-1] == "check    passed"
    assert "eval/" not in done.out


def test_check_prints_what_would_run_and_starts_nothing(world):
    done = train(world, "never", "--check")
    assert "memory   estimate" in done.out
    assert "check    passed" in done.out
    assert not (world / "runs/never").exists()


@pytest.mark.parametrize("case", ["quantised teacher", "other data order"])
def test_check_and_run_refuse_with_one_message_and_code(world, finished, tmp_path, case):
    if case == "quantised teacher":
        shutil.copytree(world / "teacher", tmp_path / "teacher")
        edit_tensors(tmp_path / "teacher", lambda t: t.update({name: x.to(torch.int8) for name, x in t.items()}))
        name, word, code, message = "int8", f"teacher.weights={tmp_path / 'teacher'}", 2, "is stored as I8"
    else:
        shutil.copytree(finished[0], world / "runs/reseeded")
        name, word, code, message = "reseeded", "run.seed=7", 3, "data order differs in run.seed: 1 in the checkpoint"
    for more in (("--check",), ()):
        assert message in train(world, name, word, *more, code=code).err


def test_truncated_store_is_refused_by_name_with_code_3(world, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(world / "data/train", store)
    path = store / "shard_00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    done = train(world, "broken", f"data.train=[{store}]", code=3)
    assert f"{path} is truncated" in done.err
    assert not (world / "runs/broken").exists()


def test_teacher_with_another_tokenizer_is_refused(world, tmp_path):
    other = tmp_path / "teacher"
    shutil.copytree(world / "teacher", other)
    found = json.loads((other / "tokenizer.json").read_text())
    found["model"]["merges"] = found["model"]["merges"][:-40]
    (other / "tokenizer.json").write_text(json.dumps(found))
    done = train(world, "odd", f"teacher.weights={other}", code=3)
    assert "another tokenizer than the teacher's" in done.err


def test_teacher_layout_and_memory_settings_change_no_number(world, finished):
    words = ("teacher.layout=tp", "debug.check_replicas=true", "teacher.overlap=true")
    train(world, "cut", *words, "teacher.max_tokens_per_forward=64", "zero.offload_optimizer=true", ranks=2)
    keys = ("loss/total", "loss/kd", "optim/grad_norm", "eval/kl_to_teacher")
    assert_same_numbers(world / "runs/cut", finished[0], keys, rel=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_quantised_teacher_prints_its_error_and_teaches_nearly_the_same(world, finished):
    done = train(world, "int8_weights", "teacher.quantize=int8", "checkpoint.export=false")
    found = re.search(r"teacher  int8: KL to its float32 self (\S+) nats/token over (\d+) tokens, weights", done.out)
    assert 0 < float(found[1]) < 0.01
    assert 0 < int(found[2]) <= 4 * 32
    assert "frozen, plain, int8 weights" in done.out
    for mine, theirs in zip(read_metrics(world / "runs/int8_weights"), read_metrics(finished[0]), strict=True):
        if "loss/kd" in theirs:
            assert mine["loss/kd"] != theirs["loss/kd"]
            assert mine["loss/kd"] == pytest.approx(theirs["loss/kd"], rel=0.05)


def test_mixture_of_experts_teaches_the_same_in_two_layouts(world):
    from kdtrain.models.tiny_mixtures import write_mixture

    teacher = world / "mixture"
    write_mixture(teacher, "qwen3_moe", packed=False, **MODEL)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(world / "teacher" / name, teacher / name)
    words = [f"teacher.weights={teacher}", "train.total_tokens=1024", "checkpoint.export=false"]
    train(world, "mixture_1", *words, "teacher.zero_stage=3", "--check")
    for done, layout in (
        (train(world, "mixture_1", *words, "teacher.zero_stage=3"), "plain x zero 3"),
        (train(world, "mixture_2", *words, "teacher.layout=tp", "debug.check_replicas=true", ranks=2), "tp 2"),
    ):
        assert re.search(rf"teacher .* 130,304 parameters \(61,184 per token\), frozen, {layout}", done.out)
    keys = ("loss/total", "loss/kd", "optim/grad_norm", "eval/kl_to_teacher")
    assert_same_numbers(world / "runs/mixture_1", world / "runs/mixture_2", keys, rel=1e-4)


OWN_RANK = ("teacher.layout=dedicated", "teacher.ranks=1")


def test_dedicated_teacher_changes_no_number_and_a_signal_to_it_stops_the_run(world, finished):
    """Stopped through its teacher, then resumed with another number of the student's ranks."""
    words = (world / "config.yaml", "run.name=own", *OWN_RANK)
    ranks = start_ranks("train.py", *words, "parallel.tp=1", ranks=2)
    deadline = time.monotonic() + 120
    while "\nteacher  1 on ranks [1], ready" not in ranks[0].output():  # not later: eight steps take a moment
        assert ranks[0].poll() is None, ranks[0].end()
        assert time.monotonic() < deadline, ranks[0].output()
        time.sleep(0.002)
    ranks[1].send_signal(signal.SIGTERM)
    ended = end_ranks(ranks)
    assert [rank.code for rank in ended] == [75, 75], ended
    run = world / "runs/own"
    state, reason = read_status(run)
    assert state == "stopped"
    assert "a rank of the dedicated teacher received a stop request" in reason
    done = run_ranks("train.py", *words, ranks=3)
    assert "mesh     2 ranks = dp 1 x tp 2" in done.out
    assert "teacher  1 on ranks [2], ready" in done.out
    assert "changed since" not in done.out, "the place of the teacher changes nothing that is learned"
    keys = ("loss/total", "loss/kd", "optim/grad_norm", "eval/val_nll", "eval/kl_to_teacher")
    assert_same_numbers(run, finished[0], keys, rel=2e-4)
    assert (run / "export/model.safetensors").is_file()
    beats = {path.name: json.loads(path.read_text()) for path in (run / "heartbeat").iterdir()}
    assert beats["rank_00002"]["done"] == "teacher"


def test_dedicated_teacher_that_lacks_a_tensor_ends_all_ranks_with_its_name(world, tmp_path):
    """Every rank reads the headers of all its files, those of the student too, which read nothing but the head."""
    broken = tmp_path / "teacher"
    shutil.copytree(world / "teacher", broken)
    lost = []

    def drop(tensors):
        lost.append(next(name for name in tensors if "mlp" in name))
        del tensors[lost[0]]

    edit_tensors(broken, drop)
    words = (world / "config.yaml", "parallel.tp=1", "run.name=lost", *OWN_RANK, f"teacher.weights={broken}")
    ended = end_ranks(start_ranks("train.py", *words, ranks=2), timeout_s=100)
    assert 2 in {rank.code for rank in ended}, ended
    assert all(rank.code for rank in ended), ended
    err = "".join(rank.err for rank in ended)
    assert f"kdtrain: {broken} has no tensor for parameter {lost[0]!r}" in err
    assert f"the teacher on rank 1 cannot be loaded: {broken} has no tensor" in err, "students may be busy"
    assert read_status(world / "runs/lost")[0] == "failed"


def test_misspelt_key_ends_in_code_2_before_torch_is_imported(world):
    started = time.monotonic()
    done = run_command(sys.executable, ROOT / "launch/train.py", world / "config.yaml", "objective.distil.kd_weight=1")
    assert done.code == 2
    assert "did you mean" in done.err.lower()
    assert time.monotonic() - started < 60
