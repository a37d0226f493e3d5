"""The guards of a run in real processes, started as a launcher starts them: messages and exit codes."""

import json
import signal
import time

import pytest

from kdtrain.models.tiny import tiny_config
from tests.support.launching import free_port, start_rank
from tests.support.tiny_run import write_run

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guards")
    return write_run(folder, student=tiny_config("smollm"), teacher=tiny_config("qwen3"), steps=60)


def start(config, *words, **place):
    """One rank of a run."""
    return start_rank("train.py", config, *words, **place)


def end_of(process):
    """(exit code, what it wrote to stderr)"""
    ended = process.end()
    return ended.code, ended.err


def status(config, name):
    return (config.parent / "runs" / name / "STATUS").read_text().partition("  ")[0]


def test_different_settings_are_refused_on_all_ranks(config):
    port = free_port()
    both = [
        start(config, "run.name=differ", f"optim.lr={rate}", rank=r, ranks=2, port=port)
        for r, rate in enumerate((1e-3, 2e-3))
    ]
    (code, err), (other, _) = [end_of(process) for process in both]
    assert (code, other) == (2, 2), err
    assert "the configuration of ranks [1] differs from rank 0's (" in err
    assert "fix: give every node the same files and the same command line" in err
    assert not (config.parent / "runs/differ").exists()


def test_second_run_in_one_folder_is_refused_and_hanging_rank_is_named(config):
    port, words = free_port(), ("run.name=held", "train.total_tokens=1280000", "checkpoint.every_steps=5")
    limits = ("guard.stall_warn_s=2", "guard.stall_exit_s=4")
    ranks = [start(config, *words, *limits, rank=rank, ranks=2, port=port) for rank in (0, 1)]
    try:
        checkpoints = config.parent / "runs/held/checkpoints"
        deadline = time.monotonic() + 120
        while not list(checkpoints.glob("step_*")):
            assert ranks[0].poll() is None, ranks[0].output("err")
            assert time.monotonic() < deadline
            time.sleep(0.05)
        code, err = end_of(start(config, *words))
        assert code == 2, err
        assert f"is in use by process {ranks[0].pid} on " in err
        assert "fix: choose another run.name" in err
        assert ranks[0].poll() is None, "the run that held the folder ended"
        ranks[1].send_signal(signal.SIGSTOP)
        code, err = end_of(ranks[0])
    finally:
        for process in ranks:
            process.kill()
    assert code == 1, err
    last = next(line for line in err.splitlines() if line.startswith("kdtrain: rank 0: step "))
    assert "; behind: rank 1 on " in last
    assert " (completed " in last
    assert "why: guard.stall_exit_s = 4 s have passed" in err
    assert "Current thread" in err or "Thread 0x" in err, "no stack"
    assert status(config, "held") == "failed"


def test_nonfinite_steps_full_disk_and_unwritable_folder_exit_with_their_codes(config):
    endless = start(config, "run.name=nan", "optim.lr=1e30", "optim.weight_decay=0", "guard.max_skipped_steps=1")
    five = ("run.name=full", "checkpoint.every_steps=5", "train.total_tokens=1280")
    full = start(config, *five, file_bytes=200_000)
    nowhere = start(config, "run.name=nowhere", "run.output_dir=/sys/kernel")

    code, err = end_of(endless)
    assert code == 4, err
    store = config.parent / "store"
    assert f"the step, number 2 in a row, was not applied\n  samples of data rank 0: {store} [" in err
    skipped = [json.loads(line) for line in (config.parent / "runs/nan/skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == 2
    assert all(len(record["sample_ids"][0]) == 8 for record in skipped)
    assert all([len(record["samples"][0].pop(str(store))), record["samples"]] == [8, [{}]] for record in skipped)
    assert status(config, "nan") == "failed"

    code, err = end_of(full)
    assert code == 3, err
    assert "step_000005 was not saved: rank 0: " in err
    assert "File too large\n  fix: free space" in err
    assert end_of(start(config, *five))[0] == 0

    code, err = end_of(nowhere)
    assert code == 2, err
    assert "cannot write the run folder /sys/kernel" in err
