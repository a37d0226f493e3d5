"""The folder of a killed preparation is removed by the next one; that of a running process is kept."""

import fcntl
import os
import socket
import subprocess
import sys

import pytest

from kdtrain.data.token_store import TokenStore, TokenStoreWriter
from kdtrain.stores import unfinished
from tests.support.tiny_data import write_store, write_tokenizer

WRITES = """
import os, sys, time
from kdtrain.data.token_store import TokenStoreWriter
with TokenStoreWriter(sys.argv[1], sys.argv[2], 0, source="x") as writer:
    writer.add([1, 2, 3], 3)
    print("writing", flush=True)
    if sys.argv[3] == "wait":
        sys.stdin.read()
    os._exit(9)
"""


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer")


def writer_in_a_process(folder, tokenizer, how):
    words = [sys.executable, "-c", WRITES, str(folder), str(tokenizer), how]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def unfinished_in(folder):
    return sorted(p.name for p in folder.iterdir() if ".writing." in p.name)


def ended_process():
    """Id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_next_preparation_removes_folder_of_killed_one(tmp_path, tokenizer, logged):
    out = tmp_path / "out"
    for name in ("train", "validation"):
        process = writer_in_a_process(out / name, tokenizer, "die")
        assert process.wait(timeout=60) == 9
        process.communicate()
    left = unfinished_in(out)
    assert len(left) == 1  # the second removed the first's
    assert left[0].startswith(f".validation.writing.{socket.gethostname()}.{process.pid}.")
    assert (out / left[0] / "shard_00000.bin").exists()
    store = write_store(out / "train", [[1, 2]], tokenizer)
    assert unfinished_in(out) == []
    assert f"removed {out / left[0]}, left by a killed process" in logged.text
    TokenStore.open(store.path).verify()


def test_folder_of_running_process_is_kept(tmp_path, tokenizer, logged):
    out = tmp_path / "out"
    process = writer_in_a_process(out / "train", tokenizer, "wait")
    try:
        assert process.stdout.readline() == "writing\n"
        mine = TokenStoreWriter(out / "train", tokenizer, 0, source="x")
        with mine as first, TokenStoreWriter(out / "validation", tokenizer, 0, source="x"):
            assert len(unfinished_in(out)) == 3
            first.add([1], 1)
            first.commit()
        assert len(unfinished_in(out)) == 1
        assert "removed" not in logged.text
    finally:
        process.communicate("", timeout=60)
    with TokenStoreWriter(out / "validation", tokenizer, 0, source="x"):
        assert len(unfinished_in(out)) == 1
    assert unfinished_in(out) == []


def test_locked_folder_of_invisible_process_is_kept(tmp_path):
    path = tmp_path / f".train.writing.{socket.gethostname()}.{ended_process()}.01234567"
    path.mkdir()
    holder = os.open(path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    unfinished.remove_abandoned(tmp_path, "prepare")
    assert path.exists()
    os.close(holder)
    unfinished.remove_abandoned(tmp_path, "prepare")
    assert not path.exists()


def test_process_id_decides_where_folders_cannot_be_locked(tmp_path, tokenizer, monkeypatch):
    def unsupported(*_):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / f".train.writing.{socket.gethostname()}.{ended_process()}.01234567").mkdir()
    with (
        TokenStoreWriter(tmp_path / "a", tokenizer, 0, source="x"),
        TokenStoreWriter(tmp_path / "b", tokenizer, 0, source="x"),
    ):
        assert [name.split(".")[1] for name in unfinished_in(tmp_path)] == ["a", "b"]


def test_folders_of_other_hosts_and_other_names_are_kept(tmp_path, logged):
    names = [
        f".train.writing.{socket.gethostname()}x.{ended_process()}.01234567",
        f".train.writing.{socket.gethostname()}.{os.getppid()}.01234567",
        f".train.writing.{socket.gethostname()}.0.01234567",
        ".train.writing.01234567",
        ".notes.writing.down",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    unfinished.remove_abandoned(tmp_path, "prepare")
    assert unfinished_in(tmp_path) == sorted(names)
    assert logged.messages == [
        f"prepare  {tmp_path / '.train.writing.01234567'} is unfinished; remove it if nothing writes to it"
    ]


def test_failed_removal_is_logged_as_failed(tmp_path, logged, monkeypatch):
    path = tmp_path / f".train.writing.{socket.gethostname()}.{ended_process()}.01234567"
    path.mkdir()
    monkeypatch.setattr(unfinished.shutil, "rmtree", lambda path, ignore_errors: None)
    unfinished.remove_abandoned(tmp_path, "prepare")
    assert logged.messages == [f"prepare  {path}, left by a killed process, cannot be removed"]


def test_writer_releases_its_lock(tmp_path, tokenizer):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        write_store(tmp_path / str(number), [[1, 2]], tokenizer)
        with TokenStoreWriter(tmp_path / "left", tokenizer, 0, source="x"):
            pass
    assert len(os.listdir("/proc/self/fd")) == before
