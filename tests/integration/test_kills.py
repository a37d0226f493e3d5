"""Kills at random moments of a run: complete checkpoints stay readable, resumes are exact."""

import json
import signal
from importlib import import_module
from types import SimpleNamespace

import pytest

from kdtrain.errors import CheckpointError

KILLS, KILLS_BEHIND = 4, 4
"""`make prove-soak` does the same with 200."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def soak():
    return import_module("soak")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("soak")


@pytest.fixture(scope="module")
def killed(soak, work):
    return soak.soak(work, KILLS)


@pytest.mark.deepspeed
def test_kills_lose_no_complete_checkpoint_and_resumes_are_bitwise(soak, killed):
    assert [record["number"] for record in killed] == list(range(KILLS))
    assert soak.faults(killed) == []
    assert {record["signal"] for record in killed} == {signal.SIGKILL, signal.SIGTERM}
    assert sum(record["in_save_of"] is not None for record in killed) == KILLS // 2


@pytest.mark.deepspeed
def test_kills_during_asynchronous_writes_lose_no_complete_checkpoint(soak, tmp_path):
    found = soak.soak(tmp_path, KILLS_BEHIND, behind=True)
    assert len(found) == KILLS_BEHIND
    assert soak.faults(found) == []
    assert {record["signal"] for record in found} == {signal.SIGKILL, signal.SIGTERM}


@pytest.mark.deepspeed
def test_soak_reports_lost_damaged_and_different_checkpoints(soak, killed, work):
    run = work / "world/runs/whole"
    whole = soak.outcome(run)
    lost = SimpleNamespace(
        run=run, started=0.0, log="", wait=lambda: -9, complete=lambda: [15, 16, 17], unfinished=lambda: []
    )
    plan = soak.Plan(signal.SIGKILL, 0.0, None)
    assert soak.aftermath(lost, plan)["wrong"] == "step 17 was complete when the signal was sent, the newest now is 16"
    (file,) = (run / "checkpoints/step_000016").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256"):
        soak.last_good(run)
    lost.complete = lambda: [16]
    assert soak.aftermath(lost, plan)["wrong"].startswith("the newest checkpoint cannot be read: ")
    (run / "checkpoints/step_000016").rename(run / "checkpoints/aside")
    assert soak.outcome(run) != whole


@pytest.mark.deepspeed
def test_soak_resumes_from_complete_lines_of_its_log(soak, killed, work):
    log = work / "soak.jsonl"
    assert soak.read_log(log) == killed == soak.soak(work, KILLS - 1)
    log.write_text(log.read_text()[:-5])
    assert soak.read_log(log) == killed[:-1]


def test_soak_table_counts_kills_and_shows_faults(soak):
    record = {
        "signal": 9,
        "in_save_of": 3,
        "name": "a",
        "code": -9,
        "left": [],
        "step": 4,
        "wrong": "",
        "same": True,
        "commit": "abc",
    }
    inside = {**record, "left": [".step_000005.writing"]}
    text = soak.table_of([record, inside, inside])
    assert "**3 kills in 1 runs, 0 with a fault.** 3 were aimed" in text
    assert "| inside a save (a partial checkpoint was left) | 2 | 0 |" in text
    bad = {**record, "same": False}
    text = soak.table_of([record, bad])
    assert "1 with a fault" in text
    assert "bit for bit" not in text
    assert f"Fault: {json.dumps(bad)}" in text
