import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdtrain.config.schema import WandbSection
from kdtrain.errors import ConfigError
from kdtrain.telemetry.wandb_sink import WandbSink
from tests.support.wandb_server import WandbServer

HAS_WANDB = importlib.util.find_spec("wandb") is not None
needs_wandb = pytest.mark.skipif(not HAS_WANDB, reason="wandb is not installed")


def inspect(folder, *options):
    """What wandb's own reader prints of the newest offline run of `folder`: JSON lines, or one object (--summary)."""
    newest = max(folder.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", *options, str(newest)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    return done.stdout


def test_mode_off_needs_no_package_and_writes_nothing(tmp_path):
    sink = WandbSink(WandbSection(mode="off"), tmp_path, name="a", config={})
    sink.write({"data/step": 1, "loss/ce": 1.0})
    sink.close()
    assert sink.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_a_configuration_error(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(ConfigError, match=r"log\.wandb\.mode = offline(.|\n)*fix: pip install wandb") as caught:
        WandbSink(WandbSection(mode="offline"), tmp_path, name="a", config={})
    assert caught.value.exit_code == 2


def history(part):
    """(_step, data/step, loss/ce, eval/val_nll) of each row in one wandb folder."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    keys = ("_step", "data/step", "loss/ce", "eval/val_nll")
    return [tuple(map(r["history"]["item"].get, keys)) for r in rows if r["type"] == "history"]


def parts_of(folder):
    return sorted(folder.glob("wandb/offline-run-*"))


RUN_PART = """
import os, signal, sys, time
from pathlib import Path
from kdtrain.config.schema import WandbSection
from kdtrain.log import setup_logging
from kdtrain.telemetry.jsonl_sink import JsonlSink
from kdtrain.telemetry.wandb_sink import WandbSink
folder, mode, done, end = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
setup_logging(0)
jsonl = JsonlSink(folder / "metrics.jsonl", resume_step=done)
sink = WandbSink(WandbSection(mode=mode, project="p"), folder, name="a", config={}, resume_step=done)
for step in range(done + 1, done + 3):
    for one in (jsonl, sink):
        one.write({"data/step": step, "data/tokens_seen": 4096 * step, "loss/ce": 3.0 / step})
        one.write({"data/step": step, "data/tokens_seen": 4096 * step, "eval/val_nll": 6.0 / step})
if end == "kill":
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)
sink.close()
"""


def run_part(folder, done, end="close", mode="offline", **env):
    """Two optimizer steps after `done`, each reported and evaluated, by a process of its own; what it printed."""
    wait_for_another_second(folder)
    command = [sys.executable, "-c", RUN_PART, str(folder), mode, str(done), end]
    env = outside_wandb(folder) | env
    finished = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL, env=env
    )
    assert finished.returncode == (0 if end == "close" else -9), finished.stderr
    return finished.stdout


def wait_for_another_second(folder):
    """wandb names a folder by the second of its start."""
    newest = max((path.stat().st_ctime for path in parts_of(folder)), default=0.0)
    time.sleep(max(0.0, newest + 1.1 - time.time()))


def outside_wandb(folder):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return kept | {"NETRC": str(folder / "none"), "HOME": str(folder), "WANDB_ERROR_REPORTING": "false"}


def sync(folder, server, command):
    """Run the command that the console named."""
    words = shlex.split(command)
    assert words[:2] == ["wandb", "sync"]
    env = outside_wandb(folder) | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL, env=env
    )
    assert "ERROR" not in done.stdout + done.stderr, done.stdout + done.stderr


def row(step):
    return (step, step, 3.0 / step, 6.0 / step)


def uploaded(server, folder):
    run_id = (folder / "wandb_run_id.txt").read_text().strip()
    keys = ("_step", "data/step", "loss/ce", "eval/val_nll")
    return [tuple(map(row.get, keys)) for row in server.history["p", run_id]]


@needs_wandb
def test_resumed_run_is_one_history_on_disk_and_on_a_server(tmp_path):
    run_part(tmp_path, 0)
    output = run_part(tmp_path, 2)
    first, second = parts_of(tmp_path)
    assert [history(first), history(second)] == [[row(1), row(2)], [row(3), row(4)]]
    commands = set(re.findall("`(wandb sync .*)`", output))
    assert commands == {f"wandb sync {first} {second}"}, output
    assert output.count("in 2 parts that belong into one command") == 2, "at the start, and at the end"
    with WandbServer() as server:
        sync(tmp_path, server, commands.pop())
        assert uploaded(server, tmp_path) == [row(1), row(2), row(3), row(4)]
        assert server.offsets == [0, 2]


@pytest.mark.slow
@needs_wandb
def test_resumed_run_sends_records_that_a_killed_process_lost(tmp_path):
    run_part(tmp_path, 0, "kill")
    [killed] = parts_of(tmp_path)
    assert len(history(killed)) < 2, "wandb keeps a row until the next step begins"
    output = run_part(tmp_path, 2)
    rows = [row for part in parts_of(tmp_path) for row in history(part)]
    assert rows == [row(1), row(2), row(3), row(4)]
    with WandbServer() as server:
        sync(tmp_path, server, re.findall("`(wandb sync .*)`", output)[-1])
        assert uploaded(server, tmp_path) == rows


@pytest.mark.slow
@needs_wandb
def test_repeated_steps_of_a_resumed_run_are_sent_once(tmp_path):
    run_part(tmp_path, 0)
    run_part(tmp_path, 1)  # went back to step 1, does 2 again, and 3
    assert [history(part) for part in parts_of(tmp_path)] == [[row(1), row(2)], [row(3)]]


@pytest.mark.slow
@needs_wandb
def test_run_from_scratch_is_a_new_wandb_run(tmp_path):
    run_part(tmp_path, 0, "kill")
    former = (tmp_path / "wandb_run_id.txt").read_text()
    run_part(tmp_path, 0)
    assert (tmp_path / "wandb_run_id.txt").read_text() != former
    assert (tmp_path / "wandb_run_id.txt.before").read_text() == former
    assert history(parts_of(tmp_path)[-1]) == [row(1), row(2)]


@pytest.mark.slow
@needs_wandb
def test_resumed_online_run_sends_missing_records(tmp_path):
    with WandbServer() as server:
        online = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        run_part(tmp_path, 0, "kill", mode="online", **online)
        run_part(tmp_path, 2, mode="online", **online)
        assert uploaded(server, tmp_path) == [row(1), row(2), row(3), row(4)]
        run_part(tmp_path, 4, mode="online", **online)
        assert [row[0] for row in uploaded(server, tmp_path)] == [1, 2, 3, 4, 5, 6]


@needs_wandb
def test_offline_run_reads_back_with_wandbs_reader(tmp_path):
    settings = WandbSection(mode="offline", project="kdtrain-test")
    sink = WandbSink(settings, tmp_path, name="my-run", config={"optim": {"lr": 0.5}})
    run_id = sink.run_id
    for step in (1, 2):
        sink.write({"data/step": step, "data/tokens_seen": 4096 * step, "loss/ce": 3.0 / step})
    sink.close()
    records = [json.loads(line) for line in inspect(tmp_path).splitlines()]
    axes = [r["metric"]["step_metric"] for r in records if r.get("metric", {}).get("glob_name") == "*"]
    assert axes == ["data/tokens_seen"]
    run = json.loads(inspect(tmp_path, "--summary"))
    assert run["run_id"] == run_id
    assert run["summary"]["loss/ce"] == 1.5
    assert run["state"] == "finished"


START_ONLINE = """
import sys
import time
from pathlib import Path
from kdtrain.config.schema import WandbSection
from kdtrain.errors import ConfigError
from kdtrain.log import setup_logging
from kdtrain.telemetry.wandb_sink import WandbSink
setup_logging(0)
try:
    sink = WandbSink(WandbSection(mode="online"), Path(sys.argv[1]), name="a", config={}, init_timeout_s=2.0)
except ConfigError as error:
    sys.exit(f"refused: {error}")
sink.write({"data/step": 1, "data/tokens_seen": 1, "loss/ce": 2.25})
sink.close()
"""


def start_online(folder, key):
    """A process of its own, with a server address without a listener: wandb keeps its settings per process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    env = inherited | {
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": key,
        "NETRC": str(folder / "none"),
        "HOME": str(folder),
        "WANDB_ERROR_REPORTING": "false",
    }
    return subprocess.run(
        [sys.executable, "-c", START_ONLINE, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
        env=env,
    )


@needs_wandb
def test_online_mode_without_a_key_is_a_configuration_error(tmp_path):
    done = start_online(tmp_path, key="")
    assert "refused: log.wandb.mode = online" in done.stderr, done.stderr
    assert "fix: wandb login" in done.stderr


@needs_wandb
def test_unreachable_server_warns_and_records_offline(tmp_path):
    done = start_online(tmp_path, key="0" * 40)
    assert done.returncode == 0, done.stderr
    assert "wandb's server cannot be reached" in done.stdout
    assert "2.25" in inspect(tmp_path)
    run_id = (tmp_path / "wandb_run_id.txt").read_text().strip()
    assert [path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")] == [f"run-{run_id}.wandb"]
