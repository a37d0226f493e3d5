"""What guards a run, as its user meets it: real processes, started as a launcher would; messages and exit codes."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdtrain.models.tiny import tiny_config
from tests.support.tiny_run import write_run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guards")
    return write_run(folder, student=tiny_config("smollm"), teacher=tiny_config("qwen3"), steps=60)


def start(config, *words, rank=0, ranks=1, port=0, **settings):
    """One rank of a run, with the environment that a launcher gives it."""
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if ranks > 1:
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(ROOT / "launch/train.py"), str(config), *words]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", **settings
    )


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def end_of(process, timeout_s=120):
    """(exit code, what it said on stderr)"""
    try:
        return process.wait(timeout_s), process.communicate()[1]
    finally:
        process.kill()


def status(config, name):
    return (config.parent / "runs" / name / "STATUS").read_text().partition("  ")[0]


def test_ranks_with_different_settings_are_refused_on_all_of_them(config):
    port = free_port()
    both = [
        start(config, "run.name=differ", f"optim.lr={rate}", rank=r, ranks=2, port=port)
        for r, rate in enumerate((1e-3, 2e-3))
    ]
    (code, said), (other, _) = [end_of(process) for process in both]
    assert (code, other) == (2, 2), said
    assert "the configuration of ranks [1] differs from rank 0's (" in said
    assert "fix: give every node the same files and the same command line" in said
    assert not (config.parent / "runs/differ").exists()


def test_a_second_run_in_the_folder_is_refused_and_a_rank_that_hangs_is_named(config):
    port, words = free_port(), ("run.name=held", "train.total_tokens=1280000", "checkpoint.every_steps=5")
    limits = ("guard.stall_warn_s=2", "guard.stall_exit_s=4")
    ranks = [start(config, *words, *limits, rank=rank, ranks=2, port=port) for rank in (0, 1)]
    try:
        checkpoints = config.parent / "runs/held/checkpoints"
        deadline = time.monotonic() + 120
        while not list(checkpoints.glob("step_*")):
            assert ranks[0].poll() is None, ranks[0].communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        code, said = end_of(start(config, *words))
        assert code == 2, said
        assert f"is in use by process {ranks[0].pid} on " in said
        assert "fix: choose another run.name" in said
        assert ranks[0].poll() is None, "the run that held the folder ended"
        ranks[1].send_signal(signal.SIGSTOP)
        code, said = end_of(ranks[0])
    finally:
        for process in ranks:
            process.kill()
    assert code == 1, said
    last = next(line for line in said.splitlines() if line.startswith("kdtrain: rank 0: step "))
    assert "; behind: rank 1 on " in last
    assert " (completed " in last
    assert "why: guard.stall_exit_s = 4 s have passed" in said
    assert "Current thread" in said or "Thread 0x" in said, "no stack"
    assert status(config, "held") == "failed"


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def test_a_run_that_cannot_go_on_says_why_and_exits_with_its_code(config):
    endless = start(config, "run.name=nan", "optim.lr=1e30", "optim.weight_decay=0", "guard.max_skipped_steps=1")
    full = start(config, "run.name=full", "checkpoint.every_steps=5", "train.total_tokens=1280", preexec_fn=limit_files)
    nowhere = start(config, "run.name=nowhere", "run.output_dir=/sys/kernel")

    code, said = end_of(endless)
    assert code == 4, said
    assert "the step, number 2 in a row, was not applied\n  samples of data rank 0: [" in said
    skipped = [json.loads(line) for line in (config.parent / "runs/nan/skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == 2
    assert all(len(record["sample_ids"][0]) == 8 for record in skipped)
    assert status(config, "nan") == "failed"

    code, said = end_of(full)
    assert code == 3, said
    assert "step_000005 was not saved: rank 0: " in said
    assert "File too large\n  fix: free space" in said
    assert end_of(start(config, "run.name=full", "checkpoint.every_steps=5", "train.total_tokens=1280"))[0] == 0

    code, said = end_of(nowhere)
    assert code == 2, said
    assert "cannot write the run folder /sys/kernel" in said
