"""The lease of a run folder's lock: who may take it over, and what becomes of a holder that comes back to life."""

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


def left_behind(folder, **changes):
    """A LOCK as a run on another host would have left it."""
    found = {"host": "elsewhere", "pid": 7, "started": "1", "since": "yesterday", "lease_s": LEASE_S, **changes}
    (folder / "LOCK").write_text(json.dumps(found) + "\n")
    return found


def test_a_lock_nobody_touches_is_taken_over_after_its_lease_and_no_sooner(tmp_path):
    left_behind(tmp_path)
    os.utime(tmp_path / "LOCK", (0, 0))  # however old it looks: that may be another host's clock
    began = time.monotonic()
    mine = take_lock(tmp_path, LEASE_S)
    assert LEASE_S <= time.monotonic() - began < 20
    assert read_lock(tmp_path / "LOCK") == mine
    assert [path.name for path in tmp_path.iterdir()] == ["LOCK"]


@pytest.mark.parametrize(
    "held", [{"lease_s": None}, {"host": socket.gethostname(), "processes": "a container", "lease_s": None}]
)
def test_without_a_lease_only_the_holders_own_host_and_process_numbers_can_tell(tmp_path, held):
    left_behind(tmp_path, **held)
    with pytest.raises(ConfigError, match=r"in use by process 7 on (.|\n)*if that process has ended, remove .*LOCK"):
        take_lock(tmp_path, LEASE_S)


def test_a_lock_that_is_given_back_while_somebody_waits_is_free(tmp_path):
    left_behind(tmp_path, lease_s=30.0)
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


def test_a_live_holder_is_never_robbed_and_one_that_stood_still_ends_when_it_wakes(tmp_path, monkeypatch):
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
            _, said = holder.communicate(timeout=30)
            assert holder.returncode == 1
            assert f"LOCK was taken over by process {os.getpid()} on another-host" in said
            assert "run.lock_lease_s = 2 s" in said
            assert read_lock(folder.path / "LOCK") == before


def test_a_keeper_touches_its_lock_puts_it_back_and_gives_up_only_to_another(tmp_path):
    mine, ended, told = take_lock(tmp_path, LEASE_S), [], []
    keeper, path = LockKeeper(tmp_path, mine, lost=told.append, end=ended.append), tmp_path / "LOCK"
    os.utime(path, (0, 0))
    keeper.look()
    assert path.stat().st_mtime > 0
    path.unlink()
    keeper.look()
    assert read_lock(path) == mine
    path.write_text('{"host": "half wri')
    keeper.look()
    assert ended == []
    left_behind(tmp_path)
    keeper.look()
    assert (ended, len(told)) == ([1], 1)
    assert "was taken over by process 7 on elsewhere since yesterday" in told[0]


def test_a_keeper_whose_words_nobody_reads_gives_up_as_well(tmp_path, monkeypatch):
    class Broken:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    keeper = LockKeeper(tmp_path, take_lock(tmp_path, LEASE_S), end=(ended := []).append)
    left_behind(tmp_path)
    monkeypatch.setattr(sys, "stderr", Broken())
    keeper.look()
    assert ended == [1]


def test_a_lock_that_cannot_be_touched_is_told_once(tmp_path, monkeypatch, caplog):
    keeper = LockKeeper(tmp_path, take_lock(tmp_path, LEASE_S))

    def refuse(path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "utime", refuse)
    keeper.look()
    keeper.look()
    assert caplog.messages == [
        f"{tmp_path / 'LOCK'} cannot be touched: Stale file handle; in 0.6 s another run may take the folder over"
    ]


def test_of_two_who_found_the_same_stale_lock_the_slower_leaves_the_fasters_alone(tmp_path):
    stale = left_behind(tmp_path)
    faster = left_behind(tmp_path, host="faster", pid=8)
    with pytest.raises(ConfigError, match="was taken by another run just now"):
        lock._remove(tmp_path / "LOCK", stale)
    assert read_lock(tmp_path / "LOCK") == faster
    assert [path.name for path in tmp_path.iterdir()] == ["LOCK"]
    (tmp_path / "LOCK").unlink()
    with pytest.raises(ConfigError, match="was taken by another run just now"):
        lock._remove(tmp_path / "LOCK", stale)


def test_who_is_robbed_while_his_lock_is_still_empty_notices(tmp_path, monkeypatch):
    path, sync = tmp_path / "LOCK", os.fsync

    def faster(descriptor):
        monkeypatch.setattr(os, "fsync", sync)
        path.unlink()
        left_behind(tmp_path, host="faster", pid=8)
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
