"""Heartbeats and the watchdog: a stalled rank is named by the others and, with guard.stall_exit_s, ends them."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdtrain.log import LOGGER
from kdtrain.run_state import heartbeat
from kdtrain.run_state.heartbeat import (
    Heartbeat,
    PhaseTracker,
    Watchdog,
    clear_heartbeats,
    ranks_behind,
    read_heartbeats,
)

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def warned(monkeypatch):
    messages = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *args: messages.append(text % args))
    return messages


def ranks(tmp_path, clock, count=3, **limits):
    """Phase trackers and their watchdogs without threads."""
    trackers = [PhaseTracker(rank, clock, clock) for rank in range(count)]
    dogs = [Watchdog(tracker, tmp_path, count, **({"warn_s": 10.0} | limits)) for tracker in trackers]
    return trackers, dogs


def work(tracker, step, *phases):
    tracker.begin(step)
    for name in phases:
        with tracker.phase(name):
            pass


def test_heartbeat_has_step_completed_phase_and_current_phase(clock):
    tracker = PhaseTracker(3, clock, clock)
    work(tracker, 7, "data_wait")
    clock.now += 5
    with tracker.phase("forward"):
        with tracker.phase("teacher"):
            assert (tracker.beat.now, tracker.beat.done, tracker.beat.count, tracker.beat.time) == (
                "teacher",
                "data_wait",
                1,
                1000,
            )
        assert (tracker.beat.now, tracker.beat.done, tracker.beat.count, tracker.beat.time) == (
            "forward",
            "teacher",
            2,
            1005,
        )
    assert (tracker.beat.now, tracker.beat.done, tracker.beat.step, tracker.beat.rank) == ("", "forward", 7, 3)


def test_heartbeat_file_is_complete_and_written_only_after_a_change(tmp_path, clock, monkeypatch):
    (tracker, *_), (dog, *_) = ranks(tmp_path, clock)
    work(tracker, 1, "data_wait")
    dog.look()
    path = tmp_path / "heartbeat/rank_00000"
    assert json.loads(path.read_text())["done"] == "data_wait"
    assert [p.name for p in path.parent.iterdir()] == ["rank_00000"]
    monkeypatch.setattr(os, "replace", lambda *given: pytest.fail("written without news"))
    dog.look()


def test_files_are_written_no_more_than_once_a_second(tmp_path, clock):
    assert ranks(tmp_path, clock, warn_s=0.1)[1][0]._every == 1.0
    assert ranks(tmp_path, clock, warn_s=300.0)[1][0]._every == 5.0


def test_rank_behind_is_named_with_last_completed_phase(tmp_path, clock, warned):
    trackers, dogs = ranks(tmp_path, clock)
    for tracker in trackers:
        work(tracker, 4, "data_wait", "forward", "backward", "optimizer")
        tracker.begin(5)
    work(trackers[0], 5, "data_wait")
    work(trackers[2], 5, "data_wait")
    clock.now += 9.5
    for dog in dogs:
        dog.look()
    assert warned == []
    clock.now += 1.5
    dogs[0].look()
    host = trackers[1].beat.host
    assert warned == [
        "stall    rank 0: step 5 has taken 11 s (between phases); "
        f"behind: rank 1 on {host} (completed optimizer of step 4 11 s ago)"
    ]


def test_stall_warning_repeats_when_wait_doubles_and_ends_with_step(tmp_path, clock, warned):
    (tracker, *_), (dog, *_) = ranks(tmp_path, clock, count=1)
    tracker.begin(1)
    times = []
    for second in range(50):
        dog.look()
        times += [second] * (len(warned) > len(times))
        clock.now += 1
    assert times == [10, 20, 40]
    assert warned[0].endswith("step 1 has taken 10 s (between phases); all ranks have completed the same phases")
    tracker.begin(2)
    dog.look()
    clock.now += 10
    dog.look()
    assert len(warned) == 4
    assert "step 2" in warned[-1]


def test_stall_warning_reports_dedicated_teachers_separately(tmp_path, clock, warned):
    (tracker, *_), (dog, *_) = ranks(tmp_path, clock, count=1, teachers=[1, 2])
    teacher = PhaseTracker(1, clock, clock)
    teachers_dog = Watchdog(teacher, tmp_path, 3, warn_s=10.0)
    work(teacher, 5, "teacher")
    teachers_dog.look()
    tracker.begin(1)
    clock.now += 12
    with tracker.phase("forward"), tracker.phase("teacher"):
        dog.look()
    (words,) = warned
    assert words.startswith("stall    rank 0: step 1 has taken 12 s (teacher); teachers: rank 1 on ")
    assert "(completed teacher of step 5 12 s ago), rank 2 (no heartbeat); all ranks have completed" in words


def test_evaluation_time_is_measured_separately(tmp_path, clock, warned):
    (tracker, *_), (dog, *_) = ranks(tmp_path, clock, count=1)
    tracker.begin(1)
    clock.now += 9
    with tracker.phase("evaluate", apart=True):
        clock.now += 9
        dog.look()
    clock.now += 9
    dog.look()
    assert warned == []
    with tracker.phase("evaluate", apart=True):
        clock.now += 10
        dog.look()
    assert "(evaluate)" in warned[0]


def test_rank_without_heartbeat_is_behind_and_old_heartbeats_are_cleared(tmp_path, clock):
    trackers, dogs = ranks(tmp_path, clock)
    dogs[0].look()
    assert ranks_behind(read_heartbeats(tmp_path, 3), 3) == [1, 2]
    (tmp_path / "heartbeat/rank_00001").write_text('{"rank": 1, "cou')
    (tmp_path / "heartbeat/rank_00002").write_text('{"rank": 2, "other": 1, "host": "a"}')
    assert list(read_heartbeats(tmp_path, 3)) == [0]
    work(trackers[2], 1, "data_wait")
    dogs[2].look()
    assert read_heartbeats(tmp_path, 2).keys() == {0}, "a smaller world than before"
    clear_heartbeats(tmp_path)
    assert read_heartbeats(tmp_path, 3) == {}
    clear_heartbeats(tmp_path)


def test_unwritable_heartbeat_folder_warns_once_per_failure(tmp_path, clock, warned):
    in_the_way = tmp_path / "heartbeat"
    in_the_way.write_text("a file where a folder should be")
    (tracker, *_), (dog, *_) = ranks(tmp_path, clock, count=1)
    for step in (1, 2):
        tracker.begin(step)
        dog.look()
    assert len(warned) == 1
    assert "other ranks cannot see this rank" in warned[0]
    in_the_way.unlink()
    dog.look()
    assert read_heartbeats(tmp_path, 1)[0].step == 2
    clear_heartbeats(tmp_path)
    in_the_way.write_text("again")
    tracker.begin(3)
    dog.look()
    assert len(warned) == 2


def test_thread_writes_during_work_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "SHORTEST_S", 0.01)
    tracker = PhaseTracker()
    with Watchdog(tracker, tmp_path, 1, warn_s=0.04):
        work(tracker, 1, "data_wait")
        deadline = time.monotonic() + 10
        while read_heartbeats(tmp_path, 1)[0].done != "data_wait" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read_heartbeats(tmp_path, 1)[0].done == "data_wait"
        work(tracker, 2, "backward")
    assert read_heartbeats(tmp_path, 1)[0].done == "backward"


HANG = """
import sys, time
from pathlib import Path
from kdtrain.run_state.heartbeat import PhaseTracker, Watchdog
folder, tracker = Path(sys.argv[1]), PhaseTracker()
with Watchdog(tracker, folder, 2, warn_s=0.5, exit_s=1.0, on_exit=lambda why: (folder / "STATUS").write_text(why)):
    tracker.begin(3)
    with tracker.phase("forward"):
        time.sleep(60)
"""


def test_hanging_rank_prints_table_and_stack_and_exits_with_1(tmp_path):
    other = Heartbeat(
        1, "elsewhere", step=3, count=0, done="optimizer", done_step=2, time=time.time() - 40, now="data_wait"
    )
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat/rank_00001").write_text(json.dumps({name: getattr(other, name) for name in other.__slots__}))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path)], env=env, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()  # a look just before 1 s has passed only warns
    first, why, header, _, mine, theirs, *trace = lines[lines[0].startswith("stall") :]
    message = r"kdtrain: rank 0: step 3 has taken \d+ s \(forward\); all ranks have completed the same"
    assert re.match(message, first), first  # on a busy machine a little later than after 1 s
    assert why == "  why: guard.stall_exit_s = 1 s have passed"
    assert header.split() == ["rank", "host", "step", "phases", "completed", "in", "seconds", "ago"]
    assert mine.split()[2:6] == ["3", "0", "start/0", "forward"]
    assert theirs.split()[:6] == ["1", "elsewhere", "3", "0", "optimizer/2", "data_wait"]
    assert "line 9 in <module>" in "\n".join(trace)
    assert (tmp_path / "STATUS").read_text() == first.removeprefix("kdtrain: ")


MUTE = """
import os, sys, time
from pathlib import Path
from kdtrain.run_state import heartbeat
from kdtrain.run_state.heartbeat import PhaseTracker, Watchdog
folder, what, tracker = Path(sys.argv[1]), sys.argv[2], PhaseTracker()
heartbeat.GRACE_S = 1.0

def on_exit(why):
    if what == "disk":
        raise OSError(28, "No space left on device")
    if what == "file system":
        time.sleep(60)

if what == "reader":
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(read)
    os.close(write)
if what == "heartbeat":
    (folder / "heartbeat").mkdir()
    os.mkfifo(folder / "heartbeat/rank_00001")  # opening it never returns
with Watchdog(tracker, folder, 2, warn_s=0.5, exit_s=1.0, on_exit=on_exit):
    tracker.begin(3)
    time.sleep(60)
"""


@pytest.mark.parametrize("what", ["disk", "file system", "reader", "heartbeat"])
def test_hanging_rank_exits_when_its_report_fails(tmp_path, what):
    command = [sys.executable, "-c", MUTE, str(tmp_path), what]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, timeout=50, check=False)
    assert done.returncode == 1
