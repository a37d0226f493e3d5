"""The batch script of docs/clusters.md, run with programs that replace Slurm's srun and scontrol."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdtrain.config.launcher import FIRST_PORT, NUM_PORTS
from kdtrain.models.tiny import tiny_config
from tests.support.tiny_run import write_run

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
pytestmark = [pytest.mark.dist, pytest.mark.deepspeed, pytest.mark.slow]

SRUN = """#!{python}
'''Two tasks of one step, as srun starts them; the larger exit code. Signals are sent to the tasks, not to this.'''
import os, subprocess, sys
command = [word for word in sys.argv[1:] if not word.startswith("--")]
slurm = dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_NTASKS="2", SLURM_STEP_NODELIST="localhost")
tasks = [
    subprocess.Popen(command, env=dict(os.environ, **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i))) for i in (0, 1)
]
with open("tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = '#!/bin/sh\necho "$@" >> requeued\n'


def block(name):
    found = re.findall(rf"<!-- driven: {name} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert len(found) == 1
    return found[0]


def free_job():
    """A job id from which the tasks work out a port that is free."""
    for job in range(os.getpid(), os.getpid() + 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", FIRST_PORT + job % NUM_PORTS))
            return str(job)
    raise AssertionError("a hundred ports in a row are taken")


def environment(folder):
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {
        **{name: value for name, value in os.environ.items() if name not in hidden and not name.startswith("SLURM")},
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PATH": os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


def replaced(text, **names):
    for old, new in names.items():
        assert old in text
        text = text.replace(old, str(new))
    return text.replace("launch/train.py", str(ROOT / "launch/train.py"))


@pytest.fixture
def config(tmp_path):
    return write_run(
        tmp_path, student=tiny_config("smollm"), num_documents=300, steps=60, checkpoint={"every_steps": 2}
    )


def test_signalled_batch_job_saves_is_requeued_and_resumes(tmp_path, config):
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(replaced(block("sbatch"), **{"CONFIG.yaml": config, "=NAME": "=job"}))
    slurm = {"SLURM_JOB_ID": free_job(), "SLURM_RESTART_COUNT": "0"}

    def start(**more):
        return subprocess.Popen(
            ["bash", str(script)],
            cwd=tmp_path,
            env=environment(tmp_path) | slurm | more,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    job = start()
    deadline = time.monotonic() + 150
    while not (tmp_path / "runs/job/checkpoints/step_000002").exists():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for pid in map(int, (tmp_path / "tasks").read_text().split()):
        os.kill(pid, signal.SIGUSR1)
    output, _ = job.communicate(timeout=100)
    assert job.returncode == 75, output
    assert (tmp_path / "requeued").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    assert (tmp_path / "runs/job/STATUS").read_text().startswith("stopped  RunStopped: stopped at step ")

    output, _ = start(SLURM_RESTART_COUNT="1").communicate(timeout=150)
    assert "resumed " in output
    assert "mesh     2 ranks = dp 2 x tp 1" in output
    assert (tmp_path / "runs/job/STATUS").read_text() == "done\n"
    assert (tmp_path / "requeued").read_text().count("\n") == 1
