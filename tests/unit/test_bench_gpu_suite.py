"""The GPU suite's control flow on the CPU, through the sizes of a GPU; only its figures need the device."""

import csv
import os
import shutil
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
TOOLS = ("sh", "dirname", "mkdir", "date", "cat", "timeout", "env")


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def suite(stage, out, **environment):
    command = ["sh", str(BENCHMARKS / "gpu_suite.sh"), stage, str(out)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


def script(path, *lines):
    path.write_text("\n".join(("#!/bin/sh", *lines, "")), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def setting(device, out=Path(), small=False):
    return import_module("gpu_common").Setting(import_module("torch").device(device), out, device == "cpu", small)


@pytest.mark.slow
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
    assert sum(" n=1 " in row["case"] for row in rows) == 16  # a masked column there would leave none


def test_cpu_runs_use_the_sizes_of_a_gpu():
    """Fewer rows and narrower models, but every vocabulary, so that rules about columns are tested without a GPU."""
    cpu, gpu = setting("cpu"), setting("cuda")
    for name, listed in (("gpu_correct", "shapes"), ("gpu_ops", "shapes"), ("gpu_ops", "peer_shapes")):
        of = getattr(import_module(name), listed)
        assert [shape.vocab for shape in of(cpu)] == [shape.vocab for shape in of(gpu)]
        assert all(shape == cpu.shape(real) for shape, real in zip(of(cpu), of(gpu), strict=True))
    overlap = import_module("gpu_overlap").cases
    assert [case[0] for case in overlap(cpu)] == [case[0] for case in overlap(gpu)]
    assert [cpu.rows(count) for count in (1, 4, 4096)] == [1, 4, 5]
    assert [cpu.width(size) for size in (1, 64, 2048, 8192)] == [1, 8, 8, 32]
    assert gpu.shape(import_module("gpu_common").Shape(512, 7, 2048, 4096)).width_t == 4096


def test_each_row_is_written_before_the_next_is_measured(tmp_path):
    def found():
        yield {"a": 1}
        assert [row["a"] for row in rows_of(tmp_path / "dry_x.csv")] == ["0", "1"]
        yield {"b": 2}
        raise KeyError("stopped here")

    with pytest.raises(KeyError, match="stopped here"):
        setting("cpu", tmp_path).write("x", found(), kept=[{"a": 0}])
    assert [(row["a"], row["b"]) for row in rows_of(tmp_path / "dry_x.csv")] == [("0", ""), ("1", ""), ("", "2")]


def test_short_calls_share_a_pair_of_events():
    calls = import_module("gpu_common").calls_per_pair
    assert [calls(seconds) for seconds in (0.0, 1e-5, 1e-4, 1.9e-3, 2e-3, 1.0)] == [50, 50, 20, 2, 1, 1]


def test_a_wrong_kernel_fails_the_correctness_stage(tmp_path, monkeypatch, capsys):
    correct = import_module("gpu_correct")
    right = correct.row_answers

    def wrong(setting, backend, size, name, temperature, dtype):
        answers = right(setting, backend, size, name, temperature, dtype)
        if dtype == correct.torch.float32 and name == "tvd":
            answers["pair_grad"][3, 5] += 1.0
        return answers

    monkeypatch.setattr(correct, "row_answers", wrong)
    monkeypatch.setattr(correct, "ROW_SIZES", ((6, 257),))
    monkeypatch.setattr(correct, "shapes", lambda setting: [correct.Shape(5, 300, 16, 24)])
    monkeypatch.setattr(correct, "losses", lambda setting, shape: iter(()))
    monkeypatch.setattr(correct, "sparse_losses", lambda setting, shape: iter(()))
    monkeypatch.setattr(sys, "argv", ["gpu_correct.py", "--cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2 of 19 further off than their bound"):
        correct.main()
    assert capsys.readouterr().out.count("FAIL row kernels C=5 n=257 tvd") == 2


def test_exception_in_an_operation_is_a_row_and_the_next_one_is_checked(tmp_path, monkeypatch):
    correct = import_module("gpu_correct")

    def raises(setting, shape):
        yield correct.row("linear_kd_loss", str(shape), "torch", {})
        raise RuntimeError("out of resources")

    monkeypatch.setattr(correct, "ROW_SIZES", ())
    monkeypatch.setattr(correct, "shapes", lambda setting: [correct.Shape(5, 300, 16, 24)])
    monkeypatch.setattr(correct, "losses", raises)
    monkeypatch.setattr(sys, "argv", ["gpu_correct.py", "--cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="further off"):
        correct.main()
    rows = rows_of(tmp_path / "dry_correct.csv")
    assert [(row["op"], row["verdict"]) for row in rows[:3]] == [
        ("linear_kd_loss", "ok"),
        ("raised", "FAIL"),
        ("linear_sparse_kd_loss", "ok"),
    ]
    assert rows[1]["errors"] == "RuntimeError: out of resources"
    assert rows[-1]["op"] == "linear_topk"


def test_triton_version_does_not_need_a_distribution_of_that_name(monkeypatch):
    from types import SimpleNamespace

    common = import_module("gpu_common")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.0"))
    assert common.triton_version() == "3.6.0"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert common.triton_version() == "absent"


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
    assert len(rows) == 2 * sum(len(providers.providers(task)) for task in ("kl", "jsd", "ce"))
    for row in rows:
        assert row["absent"] or float(row["gradient_error"]) <= 1e-4, row
    absent = {(row["task"], row["provider"]): row["absent"] for row in rows if row["absent"]}
    assert absent["ce", "cut-ce"] == "needs cuda"


@pytest.mark.slow
def test_teacher_on_a_second_stream_is_compared_with_a_synchronous_one(tmp_path):
    absent = [name for name in FOREIGN if name != "transformers"]  # which kdtrain.teacher needs
    hook = f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"
    (tmp_path / "sitecustomize.py").write_text(hook, encoding="utf-8")
    done = suite("overlap", tmp_path / "out", ARGS="--cpu", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "out/dry_overlap.csv")
    assert [(row["overlap"], row["same"]) for row in rows] == [("off", "True"), ("on", "True")] * 3


def test_overlapping_teacher_with_different_results_fails_its_stage(tmp_path, monkeypatch):
    overlap = import_module("gpu_overlap")
    monkeypatch.setattr(overlap, "cases", lambda setting: [(300, (8, 1), (16, 1), 1, 5)])
    right, number = overlap.answers, iter(range(9))
    monkeypatch.setattr(overlap, "answers", lambda *case: [right(*case)[-1] + (next(number) == 2)])
    monkeypatch.setattr(sys, "argv", ["gpu_overlap.py", "--cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="gave different results"):
        overlap.main()


@pytest.mark.parametrize(
    ("error", "absent"), [("OutOfMemoryError", "out of memory"), ("LookupError", "FAILED: LookupError: too large")]
)
def test_running_out_of_memory_and_any_other_failure_are_results(error, absent):
    ops = import_module("gpu_ops")

    def run():
        raise getattr(ops.torch, error, LookupError)("too large")

    row = ops.timed(setting("cpu"), "kl", ops.Shape(1, 2, 3, 4), "a", run, 1.0)
    assert row["absent"] == absent


def test_exception_in_a_peer_is_a_row_and_the_next_one_is_measured(tmp_path, monkeypatch):
    ops = import_module("gpu_ops")

    def raises(*inputs):
        raise ValueError("not for\nthis shape")

    def two(task):
        peer = ops.providers.Provider
        return [peer("broken", task, raises), peer("naive", task, ops.providers.naive(task))]

    monkeypatch.setattr(ops.providers, "providers", two)
    monkeypatch.setattr(sys, "argv", ["gpu_ops.py", "--cpu", "--peers", "--out", str(tmp_path)])
    ops.main()
    rows = rows_of(tmp_path / "dry_peers.csv")
    assert [row["absent"] for row in rows] == ["FAILED: ValueError: not for this shape", ""] * 6


def test_exception_in_an_operation_of_kdtrain_fails_its_stage(tmp_path, monkeypatch):
    ops = import_module("gpu_ops")
    monkeypatch.setattr(ops, "shapes", lambda setting: [ops.Shape(2, 300, 8, 16)])
    monkeypatch.setattr(ops, "linear_topk", None)
    monkeypatch.setattr(sys, "argv", ["gpu_ops.py", "--cpu", "--out", str(tmp_path)])
    monkeypatch.setattr(ops, "sparse", lambda inputs, backend: lambda *five: five[0].sum() + five[1].sum())
    with pytest.raises(SystemExit, match="2 of kdtrain's operations raised"):
        ops.main()
    assert len(rows_of(tmp_path / "dry_ops.csv")) == 10


def test_useful_work_counts_the_teachers_product_and_the_students_three():
    ops = import_module("gpu_ops")
    shape = ops.Shape(10, 100, 3, 5)
    assert [ops.work_of(task, shape) for task in ("kl", "ce", "topk")] == [28_000, 18_000, 10_000]


def test_suite_refuses_an_unknown_stage_and_reports_a_missing_sanitizer(tmp_path):
    done = suite("fast", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("unknown stage fast; need gpu-1, gpu-2, gpu-3, or one stage of products ")
    done = suite("memcheck", tmp_path, PATH="/usr/bin:/bin")
    assert done.returncode == 1, done.stdout
    assert (tmp_path / "memcheck.txt").read_text(encoding="utf-8").splitlines()[1].split()[:2] == ["memcheck", "absent"]


def test_the_sanitizer_runs_without_the_caching_allocator(tmp_path):
    """A stand-in records how it was called; the tool itself needs a GPU."""
    tools = tmp_path / "bin"
    tools.mkdir()
    script(tools / "compute-sanitizer", f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >>"{tmp_path}/called"')
    for tool in ("memcheck", "racecheck"):
        done = suite(tool, tmp_path / "out", PATH=f"{tools}:{os.environ['PATH']}")
        assert done.returncode == 0, done.stdout + done.stderr
    for line, tool in zip((tmp_path / "called").read_text().splitlines(), ("memcheck", "racecheck"), strict=True):
        assert line.startswith(f"1 --tool {tool} --error-exitcode 1 ")
        assert " benchmarks/gpu_correct.py --small " in line


@pytest.mark.slow
def test_failing_stage_does_not_stop_the_others_or_the_table(tmp_path):
    python = script(
        tmp_path / "python",
        'case "$*" in *--small*) exit 124 ;; *gpu_correct*) exit 7 ;; esac',
        f'exec "{sys.executable}" "$@"',
    )
    done = suite("gpu-2", tmp_path / "out", ARGS="--cpu", PYTHON=python)
    assert done.returncode == 1, done.stdout + done.stderr
    table = (tmp_path / "out/gpu-2.txt").read_text(encoding="utf-8")
    assert done.stdout.endswith(table)
    assert [line.split()[:2] for line in table.splitlines()] == [
        *(["stage", "verdict"], ["correct", "FAIL(7)"], ["memcheck", "timeout"], ["racecheck", "timeout"]),
        ["overlap", "ok"],
    ]
    assert len(rows_of(tmp_path / "out/dry_overlap.csv")) == 6


@pytest.mark.slow
def test_suite_runs_without_git_and_without_a_python_command(tmp_path):
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in TOOLS:
        (bare / tool).symlink_to(shutil.which(tool))
    script(bare / "python3", f'exec "{sys.executable}" "$@"')
    names = {"ARGS": "--cpu", "PYTHON": "", "PATH": str(bare), "KDTRAIN_COMMIT": "abc1234"}
    done = suite("snapshot", tmp_path / "out", **names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"git: absent", "gcc: absent", "nvidia-smi: absent"} <= set(done.stdout.splitlines())
    assert {row["commit"] for row in rows_of(tmp_path / "out/dry_probe.csv")} == {"abc1234"}


def test_commit_is_unknown_without_git_unless_set(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("KDTRAIN_COMMIT", raising=False)
    assert import_module("measuring").current_commit() == "unknown"
