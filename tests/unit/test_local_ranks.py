"""launch/local_ranks.py: what every rank is given, exit codes, and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdtrain.testing.ranks import load_file

LAUNCHER = Path(__file__).resolve().parents[2] / "launch/local_ranks.py"


def start(tmp_path, ranks, code, *words):
    script = tmp_path / "script.py"
    script.write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + code)
    command = [sys.executable, str(LAUNCHER), str(ranks), str(script), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_every_rank_has_its_number_one_address_and_the_arguments(tmp_path):
    names = ("WORLD_SIZE", "LOCAL_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    code = f"sys.stdout.write(' '.join([os.environ[name] for name in {names!r}] + sys.argv[1:]) + '\\n')\n"
    said, _ = start(tmp_path, 2, code, "a=1", "b").communicate(timeout=60)
    rows = sorted(line.split() for line in said.splitlines())
    assert [row[:5] for row in rows] == [["2", "2", rank, rank, "127.0.0.1"] for rank in ("0", "1")]
    assert rows[0][5:] == rows[1][5:]
    assert rows[0][6:] == ["a=1", "b"]


def test_the_exit_code_is_that_of_the_rank_that_failed(tmp_path):
    process = start(tmp_path, 2, "sys.exit(75 if rank == 1 else 0)\n")
    process.communicate(timeout=60)
    assert process.returncode == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_become_one_sigterm_to_every_rank(tmp_path, number):
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').close()\n"
        "time.sleep(60)\n"
    )
    process = start(tmp_path, 2, code)
    while not all((tmp_path / str(rank)).exists() for rank in range(2)):
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as a terminal does
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_signal_that_arrives_before_the_ranks_is_delivered(tmp_path):
    local_ranks = load_file(LAUNCHER)
    (tmp_path / "script.py").write_text("import time\ntime.sleep(60)\n")
    ranks = []
    local_ranks.start(2, [str(tmp_path / "script.py")], ranks)
    assert local_ranks.wait(ranks, [signal.SIGTERM]) == 128 + signal.SIGTERM


def test_ranks_are_killed_if_another_cannot_be_started(tmp_path, monkeypatch):
    local_ranks, started, popen = load_file(LAUNCHER), [], subprocess.Popen

    def second_fails(*given, **settings):
        if started:
            raise OSError("no more processes")
        started.append(popen(*given, **settings))
        return started[0]

    (tmp_path / "script.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(subprocess, "Popen", second_fails)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(OSError, match="no more processes"):
        local_ranks.main(["2", str(tmp_path / "script.py")])
    assert started[0].wait(timeout=30) == -signal.SIGKILL


def test_wrong_arguments_are_refused(tmp_path):
    done = subprocess.run([sys.executable, str(LAUNCHER), "two", "x.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "RANKS SCRIPT" in done.stderr
