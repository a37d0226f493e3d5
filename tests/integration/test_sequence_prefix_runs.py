"""data.sequence_prefix in whole runs: decided once, kept by checkpoint and export, the same for validation."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.bos_models import BOS, write_bos_run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_bos_run(tmp_path_factory.mktemp("bos"))


def start(config, *words, script="train.py", ranks=1):
    """The processes of a run, with the environment that a launcher gives them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(ROOT / "launch" / script), str(config), *words]
    found = []
    for rank in range(ranks):
        if ranks > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        found.append(subprocess.Popen(command, env=env, **pipes))
    return found


def end(processes, timeout_s=120):
    """(exit codes, stdout of rank 0, stderr of each rank)"""
    try:
        said = [process.communicate(timeout=timeout_s) for process in processes]
        return [process.returncode for process in processes], said[0][0], [err for _, err in said]
    finally:
        for process in processes:
            process.kill()


def records(config, name):
    lines = (config.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
    volatile = ("time/", "throughput/", "memory/")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(volatile)} for line in lines]


def prefix_lines(config, name):
    lines = (config.parent / "runs" / name / "console.log").read_text().splitlines()
    return [line for line in lines if line.startswith("prefix ")]


@pytest.fixture(scope="module")
def whole(config):
    codes, out, errors = end(start(config, "run.name=whole"))
    assert codes == [0], errors
    return config.parent / "runs/whole", out


def test_a_run_measures_once_says_so_and_keeps_the_prefix_with_checkpoint_and_export(config, whole):
    run, out = whole
    (line,) = prefix_lines(config, "whole")
    assert line.startswith("prefix   '<bos>' (id 257): teacher's nll ")
    assert line in out
    (saved,) = run.glob("checkpoints/step_000004/checkpoint.json")
    assert json.loads(saved.read_text())["state"]["loader"]["sequence_prefix"] == [BOS]
    assert json.loads((run / "export/kdtrain.json").read_text())["sequence_prefix"] == [BOS]
    last = records(config, "whole")[-1]
    assert last["data/tokens_seen"] == 4 * 192, "positions of the prefix are seen, too"
    assert last["eval/teacher_nll"] < 1, "validation has the prefix, without which the teacher is at 8 nats"


def test_a_resumed_run_takes_the_checkpoints_prefix_and_refuses_another(config, whole):
    codes, _, errors = end(start(config, "run.name=parts", "run.time_limit_s=0.001"))
    assert codes == [75], errors
    codes, _, (error,) = end(start(config, "run.name=parts", "data.sequence_prefix=none"))
    assert codes == [3]
    assert "differs in data.sequence_prefix (ids): [257] in the checkpoint, [] here" in error
    codes, _, errors = end(start(config, "run.name=parts"))
    assert codes == [0], errors
    assert records(config, "parts") == records(config, "whole")
    assert len(prefix_lines(config, "parts")) == 1, "a resumed run must not measure again"
    assert "changed since" not in (config.parent / "runs/parts/console.log").read_text()


def test_an_evaluation_of_the_export_gives_the_numbers_of_the_run(config, whole):
    run, _ = whole
    student = ("student.architecture=null", f"student.weights={run / 'export'}")
    alone = ("teacher.weights=null", "objective.name=pretrain")
    both, one = (start(config, *student, *words, script="eval_model.py") for words in ((), alone))
    other = start(config, *student, "data.sequence_prefix=none", script="eval_model.py")
    want = records(config, "whole")[-1]
    for processes in (both, one):
        codes, out, errors = end(processes)
        assert codes == [0], errors
        assert "prefix   '<bos>' (id 257), as in the run that made student.weights" in out
        assert json.loads(out.splitlines()[-1])["eval/val_nll"] == pytest.approx(want["eval/val_nll"], rel=1e-5)
    codes, out, (error,) = end(other)
    assert codes == [2]
    assert "data.sequence_prefix = none, but student.weights was trained with '<bos>' (id 257)" in out
    assert "data.sequence_prefix = none is worse than '<bos>' (id 257)\n  teacher's nll " in error


def test_a_worse_choice_ends_all_ranks_and_a_dedicated_teacher_decides_as_one_beside_the_student(config, whole):
    refused = start(config, "run.name=refused", "parallel.tp=2", "data.sequence_prefix=none", ranks=2)
    apart = start(config, "run.name=apart", "teacher.layout=dedicated", "teacher.ranks=1", ranks=2)
    codes, _, errors = end(refused)
    assert codes == [2, 2], errors
    assert "data.sequence_prefix = none is worse than '<bos>' (id 257)\n  teacher's nll " in errors[0]
    codes, _, errors = end(apart)
    assert codes == [0, 0], errors
    assert prefix_lines(config, "apart") == prefix_lines(config, "whole")
    for one, other in zip(records(config, "apart"), records(config, "whole"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
