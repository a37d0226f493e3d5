"""The lease of a run folder's lock: when it may be taken over, and how a resumed holder ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from kdtrain.errors import ConfigError
from kdtrain.run_state import lock
from kdtrain.run_state.lock import LockKeeper, read_lock, take_lock
from kdtrain.run_state.run_folder import RunFolder

LEASE_S = 0.6


def foreign_lock(folder, **changes):
    """Write a LOCK as of a run on another host."""
    found = {"host": "elsewhere", "pid": 7, "started": "1", "since": "yesterday", "lease_s": LEASE_S, **changes}
    (folder / "LOCK").write_text(json.dumps(found) + "\n")
    return found


def test_untouched_lock_is_taken_over_after_its_lease(tmp_path):
    foreign_lock(tmp_path)
    os.utime(tmp_path / "LOCK", (0, 0))  # however old it looks: that may be another host's clock
    began = time.monotonic()
    mine = take_lock(tmp_path, LEASE_S)
    assert LEASE_S <= time.monotonic() - began < 20
    assert read_lock(tmp_path / "LOCK") == mine
    assert [path.name for path in tmp_path.iterdir()] == ["LOCK"]


@pytest.mark.parametrize(
    "held", [{"lease_s": None}, {"host": socket.gethostname(), "processes": "a container", "lease_s": None}]
)
def test_lock_without_lease_of_other_host_or_container_is_respected(tmp_path, held):
    foreign_lock(tmp_path, **held)
    with pytest.raises(ConfigError, match=r"in use by process 7 on (.|\n)*if that process has ended, remove .*LOCK"):
        take_lock(tmp_path, LEASE_S)


def test_lock_released_during_wait_is_taken(tmp_path):
    foreign_lock(tmp_path, lease_s=30.0)
    timer = threading.Timer(0.3, (tmp_path / "LOCK").unlink)
    timer.start()
    assert take_lock(tmp_path, LEASE_S)["pid"] == os.getpid()
    timer.join()


HOLD = """
import sys, time
from kdtrain.run_state.run_folder import RunFolder
with RunFolder.open(sys.argv[1], "a", lease_s=float(sys.argv[2])) as folder, folder.lock_kept():
    print("held", flush=True)
    time.sleep(60)
"""


def test_live_lock_is_respected_and_suspended_holder_exits_on_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "another-host")  # of this process only
    command = [sys.executable, "-c", HOLD, str(tmp_path), "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for _ in range(3):
            with pytest.raises(ConfigError, match=f"in use by process {holder.pid}"):
                RunFolder.open(tmp_path, "a", lease_s=LEASE_S)
        holder.send_signal(signal.SIGSTOP)
        with RunFolder.open(tmp_path, "a", lease_s=LEASE_S) as folder, folder.lock_kept():
            before = read_lock(folder.path / "LOCK")
            holder.send_signal(signal.SIGCONT)
            _, stderr = holder.communicate(timeout=30)
            assert holder.returncode == 1
            assert f"LOCK was taken over by process {os.getpid()} on another-host" in stderr
            assert "run.lock_lease_s = 2 s" in stderr
            assert read_lock(folder.path / "LOCK") == before


def test_keeper_touches_and_restores_lock_and_exits_when_taken_over(tmp_path):
    mine, ended, reported = take_lock(tmp_path, LEASE_S), [], []
    keeper, path = LockKeeper(tmp_path, mine, lost=reported.append, end=ended.append), tmp_path / "LOCK"
    os.utime(path, (0, 0))
    keeper.look()
    assert path.stat().st_mtime > 0
    path.unlink()
    keeper.look()
    assert read_lock(path) == mine
    path.write_text('{"host": "half wri')
    keeper.look()
    assert ended == []
    foreign_lock(tmp_path)
    keeper.look()
    assert (ended, len(reported)) == ([1], 1)
    assert "was taken over by process 7 on elsewhere since yesterday" in reported[0]


def test_keeper_exits_when_stderr_is_closed(tmp_path, monkeypatch):
    class Broken:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    keeper = LockKeeper(tmp_path, take_lock(tmp_path, LEASE_S), end=(ended := []).append)
    foreign_lock(tmp_path)
    monkeypatch.setattr(sys, "stderr", Broken())
    keeper.look()
    assert ended == [1]


def test_lock_that_cannot_be_touched_warns_once(tmp_path, monkeypatch, caplog):
    keeper = LockKeeper(tmp_path, take_lock(tmp_path, LEASE_S))

    def refuse(path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "utime", refuse)
    keeper.look()
    keeper.look()
    assert caplog.messages == [
        f"{tmp_path / 'LOCK'} cannot be touched: Stale file handle; in 0.6 s another run may take the folder over"
    ]


def test_slower_of_two_takers_keeps_lock_of_faster_one(tmp_path):
    stale = foreign_lock(tmp_path)
    faster = foreign_lock(tmp_path, host="faster", pid=8)
    with pytest.raises(ConfigError, match="was taken by another run just now"):
        lock._remove(tmp_path / "LOCK", stale)
    assert read_lock(tmp_path / "LOCK") == faster
    assert [path.name for path in tmp_path.iterdir()] == ["LOCK"]
    (tmp_path / "LOCK").unlink()
    with pytest.raises(ConfigError, match="was taken by another run just now"):
        lock._remove(tmp_path / "LOCK", stale)


def test_lock_stolen_before_first_write_is_detected(tmp_path, monkeypatch):
    path, sync = tmp_path / "LOCK", os.fsync

    def faster(descriptor):
        monkeypatch.setattr(os, "fsync", sync)
        path.unlink()
        foreign_lock(tmp_path, host="faster", pid=8)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", faster)
    with pytest.raises(ConfigError, match="was taken by another run just now"):
        take_lock(tmp_path, LEASE_S)
    assert read_lock(path)["host"] == "faster"


def test_no_lease_needs_no_thread(tmp_path):
    with RunFolder.open(tmp_path, "a") as folder, folder.lock_kept():
        assert not any(thread.name == "kdtrain-lock" for thread in threading.enumerate())
    with RunFolder.open(tmp_path, "a", lease_s=5.0) as folder, folder.lock_kept():
        assert any(thread.name == "kdtrain-lock" for thread in threading.enumerate())
    assert not any(thread.name == "kdtrain-lock" for thread in threading.enumerate())
