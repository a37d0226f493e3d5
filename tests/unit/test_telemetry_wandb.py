import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kdtrain.config.schema import WandbSection
from kdtrain.errors import ConfigError
from kdtrain.telemetry.wandb_sink import WandbSink

HAS_WANDB = importlib.util.find_spec("wandb") is not None
needs_wandb = pytest.mark.skipif(not HAS_WANDB, reason="wandb is not installed")


def inspect(folder, *options):
    """What wandb's own reader prints of the newest offline run of `folder`: JSON lines, or one object (--summary)."""
    newest = max(folder.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", *options, str(newest)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    return done.stdout


def test_off_needs_no_package_and_writes_nothing(tmp_path):
    sink = WandbSink(WandbSection(mode="off"), tmp_path, name="a", config={})
    sink.write({"loss/ce": 1.0})
    sink.close()
    assert sink.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_a_configuration_error_with_a_fix(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(ConfigError, match=r"log\.wandb\.mode = offline(.|\n)*fix: pip install wandb") as caught:
        WandbSink(WandbSection(mode="offline"), tmp_path, name="a", config={})
    assert caught.value.exit_code == 2


@needs_wandb
def test_an_offline_run_reads_back_and_a_resumed_one_keeps_its_id(tmp_path):
    settings = WandbSection(mode="offline", project="kdtrain-test")
    sink = WandbSink(settings, tmp_path, name="my-run", config={"optim": {"lr": 0.5}})
    first_id = sink.run_id
    for step in (1, 2):
        sink.write({"data/step": step, "data/tokens_seen": 4096 * step, "loss/ce": 3.0 / step})
    sink.close()
    records = [json.loads(line) for line in inspect(tmp_path).splitlines()]
    history = [r["history"]["item"] for r in records if r.get("type") == "history"]
    assert [(h["loss/ce"], h["data/tokens_seen"]) for h in history] == [(3.0, 4096), (1.5, 8192)]
    axes = [r["metric"]["step_metric"] for r in records if r.get("metric", {}).get("glob_name") == "*"]
    assert axes == ["data/tokens_seen"]
    run = json.loads(inspect(tmp_path, "--summary"))
    assert run["run_id"] == first_id
    assert run["summary"]["loss/ce"] == 1.5
    assert run["state"] == "finished"

    resumed = WandbSink(settings, tmp_path, name="my-run", config={})
    assert resumed.run_id == first_id
    resumed.close()


START_ONLINE = """
import sys
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
sink.write({"data/tokens_seen": 1, "loss/ce": 2.25})
sink.close()
"""


def start_online(folder, key):
    """A process of its own, with a server address that nobody listens on: wandb keeps its settings per process."""
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
        check=False, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL, env=env,
    )  # fmt: skip


@needs_wandb
def test_online_without_a_key_is_a_configuration_error(tmp_path):
    done = start_online(tmp_path, key="")
    assert "refused: log.wandb.mode = online" in done.stderr, done.stderr
    assert "fix: wandb login" in done.stderr


@needs_wandb
def test_a_server_out_of_reach_is_a_warning_and_the_run_is_recorded_offline(tmp_path):
    done = start_online(tmp_path, key="0" * 40)
    assert done.returncode == 0, done.stderr
    assert "wandb's server cannot be reached" in done.stdout
    assert "2.25" in inspect(tmp_path)
    run_id = (tmp_path / "wandb_run_id.txt").read_text().strip()
    assert [path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")] == [f"run-{run_id}.wandb"]
