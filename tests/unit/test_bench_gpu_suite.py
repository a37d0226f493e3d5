"""The GPU suite's whole control flow at tiny shapes on the CPU; only its figures need the device."""

import csv
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
ROW_KERNELS = (
    *("pair_stats", "row_stats", "first_argmax", "pair_measure", "row_grad"),
    *("pair_value", "pair_round2", "pair_grad_value", "pair_grad"),
)
FOREIGN = ("deepspeed", "omegaconf", "transformers", "wandb")


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def suite(stage, out, **environment):
    command = ["sh", str(BENCHMARKS / "gpu_suite.sh"), stage, str(out)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


def test_correctness_covers_every_kernel_and_operation_without_the_training_stack(tmp_path):
    """deepspeed, omegaconf and the rest are not installed on a bare GPU machine: here they cannot be imported."""
    hook = f"import sys\nsys.modules.update(dict.fromkeys({FOREIGN!r}))\n"
    (tmp_path / "sitecustomize.py").write_text(hook, encoding="utf-8")
    done = suite("correct", tmp_path / "out", ARGS="--cpu", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "out/dry_correct.csv")
    assert {row["verdict"] for row in rows} == {"ok"}
    losses = {"linear_kd_loss", "linear_sparse_kd_loss", "linear_cross_entropy"}
    assert {row["op"] for row in rows} == {"row kernels", *losses, "linear_topk"}
    named = " ".join(row["errors"] for row in rows)
    assert all(f"{kernel}=" in named for kernel in ROW_KERNELS)


def test_a_wrong_kernel_fails_the_correctness_stage(tmp_path, monkeypatch, capsys):
    correct = import_module("gpu_correct")
    right = correct.row_answers

    def wrong(setting, backend, size, name, temperature, dtype):
        answers = right(setting, backend, size, name, temperature, dtype)
        if dtype == correct.torch.float32 and name == "tvd":
            answers["pair_grad"][3, 5] += 1.0
        return answers

    monkeypatch.setattr(correct, "row_answers", wrong)
    monkeypatch.setattr(correct, "losses", lambda setting, shape: iter(()))
    monkeypatch.setattr(correct, "sparse_losses", lambda setting, shape: iter(()))
    monkeypatch.setattr(sys, "argv", ["gpu_correct.py", "--cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2 of 19 further off than their bound"):
        correct.main()
    assert capsys.readouterr().out.count("FAIL row kernels C=6 n=257 tvd") == 2


def test_ceilings_time_products_the_copy_and_every_row_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_ceilings.py", "--cpu", "--out", str(tmp_path)])
    import_module("gpu_ceilings").main()
    rows = rows_of(tmp_path / "dry_ceilings.csv")
    assert {row["what"] for row in rows} == {"matmul", "logits", "copy", "rows"}
    kernels = {row["case"].split()[0] for row in rows if row["what"] == "rows"}
    assert kernels == {"pair_stats", "pair_round2", "pair_value", "pair_grad", "row_stats", "row_grad"}
    assert all(float(row["rate"]) > 0 and float(row["median_ms"]) > 0 for row in rows)


def test_whole_operations_are_timed_with_every_slab(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_ops.py", "--cpu", "--out", str(tmp_path)])
    import_module("gpu_ops").main()
    rows = rows_of(tmp_path / "dry_ops.csv")
    assert {(row["task"], row["provider"]) for row in rows} == {
        *((task, f"streamed-{slab}-torch") for task in ("kl", "jsd", "ce") for slab in ("5GiB", "1GiB")),
        ("sparse", "sparse-64-torch"),
        *(("topk", name) for name in ("linear_topk-64-torch", "linear_topk-256-torch", "torch-64")),
    }
    assert all(float(row["useful_tflops"]) > 0 and not row["absent"] for row in rows)


def test_peers_are_compared_or_absent_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_ops.py", "--cpu", "--peers", "--out", str(tmp_path)])
    import_module("gpu_ops").main()
    rows = rows_of(tmp_path / "dry_peers.csv")
    providers = import_module("loss_providers")
    assert len(rows) == sum(len(providers.providers(task)) for task in ("kl", "jsd", "ce"))
    for row in rows:
        assert row["absent"] or float(row["gradient_error"]) <= 1e-5, row
    absent = {(row["task"], row["provider"]): row["absent"] for row in rows if row["absent"]}
    assert absent["ce", "cut-ce"] == "needs cuda"


def test_a_teacher_on_a_second_stream_is_compared_with_one_that_waits(tmp_path):
    absent = [name for name in FOREIGN if name != "transformers"]  # which kdtrain.teacher needs
    hook = f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"
    (tmp_path / "sitecustomize.py").write_text(hook, encoding="utf-8")
    done = suite("overlap", tmp_path / "out", ARGS="--cpu", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "out/dry_overlap.csv")
    assert [(row["overlap"], row["same"]) for row in rows] == [("off", "True"), ("on", "True")]


def test_an_overlapping_teacher_with_other_answers_fails_its_stage(tmp_path, monkeypatch):
    overlap = import_module("gpu_overlap")
    right, number = overlap.answers, iter(range(9))
    monkeypatch.setattr(overlap, "answers", lambda *case: [right(*case)[-1] + (next(number) == 2)])
    monkeypatch.setattr(sys, "argv", ["gpu_overlap.py", "--cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="gave other answers"):
        overlap.main()


def test_running_out_of_memory_is_a_result():
    ops = import_module("gpu_ops")
    setting = import_module("gpu_common").Setting(ops.torch.device("cpu"), Path(), True, True)

    def run():
        raise ops.torch.OutOfMemoryError("too large")

    row = ops.timed(setting, "kl", ops.Shape(1, 2, 3, 4), "a", run, 1.0)
    assert row["absent"] == "out of memory"


def test_useful_work_counts_the_teachers_product_and_the_students_three():
    ops = import_module("gpu_ops")
    shape = ops.Shape(10, 100, 3, 5)
    assert [ops.work_of(task, shape) for task in ("kl", "ce", "topk")] == [28_000, 18_000, 10_000]


def test_the_suite_refuses_an_unknown_stage_and_says_that_the_sanitizer_is_absent(tmp_path):
    done = suite("fast", tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "unknown stage fast: correct | sanitize | ceilings | ops | peers | overlap | all",
    )
    done = suite("sanitize", tmp_path, PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gpu_sanitize.txt").read_text(encoding="utf-8") == "compute-sanitizer: absent\n"
