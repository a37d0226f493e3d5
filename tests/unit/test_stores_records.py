"""Folders of records: the same bytes after a kill at any byte, readable while written, damage refused by name."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdtrain.errors import ConfigError, DataError, StoreMismatch
from kdtrain.stores import record_folder
from kdtrain.stores.record_folder import ENTRY, RecordFolder
from kdtrain.stores.record_writer import ShardWriter, commit
from tests.support.tiny_trainer import full_disk

IDENTITY = {"corpus": "ab" * 32, "packing": {"seq_len": 16, "sequence_prefix": [1]}, "temperature": 1.0, "seed": 3}
BASE = 5 << 40
"""Keys like those of sequences."""


def records_of(first, count):
    source = random.Random(first)
    return [source.randbytes(source.choice((0, 1, 7, 30))) for _ in range(count)]


BLOCKS = {0: [(BASE, 3), (BASE + 3, 1), (BASE + 8, 4)], 1: [(BASE + 4, 4), (BASE + 12, 2), (7, 3)]}
RECORDS = {
    first + number: record
    for blocks in BLOCKS.values()
    for first, count in blocks
    for number, record in enumerate(records_of(first, count))
}


def write(folder, shards=(0, 1), stop=None):
    """Do what is still to be done, up to `stop` blocks of each shard; commit when both are finished."""
    for shard in shards:
        with ShardWriter(folder, IDENTITY, shard, 2) as writer:
            for first, count in BLOCKS[shard][len(writer.blocks) : stop]:
                writer.append(first, records_of(first, count))
            if stop is None:
                writer.finish()
    if stop is None and len(shards) == 2:
        commit(folder)


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Hundreds of folders: without waiting for the disk, which none of these tests cuts off from power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "records")
    return tmp_path / "records"


def test_every_record_is_found_by_its_key(folder):
    found = RecordFolder.open(folder, IDENTITY)
    found.verify()
    assert found.complete
    assert found.identity == IDENTITY
    assert len(found) == len(RECORDS)
    assert {key: found[key] for key in RECORDS} == RECORDS
    for key in (0, 6, 10, BASE - 1, BASE + 14, 1 << 62):
        assert key not in found
        with pytest.raises(KeyError, match=f"no record of key {key} in"):
            found[key]
    assert sorted(content_of(folder)) == [
        *("identity.json", "manifest.json"),
        *("shard_00000.bin", "shard_00000.journal", "shard_00001.bin", "shard_00001.journal"),
    ]


def test_order_in_which_shards_are_written_does_not_change_the_folder(folder, tmp_path):
    write(tmp_path / "other", shards=(1,), stop=2)
    write(tmp_path / "other", shards=(0,))
    write(tmp_path / "other", shards=(1,))
    commit(tmp_path / "other")
    assert content_of(tmp_path / "other") == content_of(folder)


def test_a_record_is_read_without_the_bytes_of_others(folder, monkeypatch):
    found, reads, pread = RecordFolder.open(folder), [], os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: reads.append(size) or pread(fd, size, offset))
    for key, record in RECORDS.items():
        reads.clear()
        assert found[key] == record
        assert len(reads) == 2
        assert sum(reads) <= len(record) + 2 * ENTRY.size


def test_more_shards_than_are_held_open_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(record_folder, "OPEN_SHARDS", 2)
    for shard in range(5):
        with ShardWriter(tmp_path / "many", {}, shard, 5) as writer:
            writer.append(shard, [bytes([shard])])
            writer.finish()
    commit(tmp_path / "many")
    found, before = RecordFolder.open(tmp_path / "many"), len(os.listdir("/proc/self/fd"))
    assert [found[key][0] for key in (0, 1, 2, 3, 4, 0)] == [0, 1, 2, 3, 4, 0]
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_folder_is_readable_while_it_is_written(tmp_path):
    folder = tmp_path / "records"
    with ShardWriter(folder, IDENTITY, 0, 2) as writer:
        for done, (first, count) in enumerate(BLOCKS[0]):
            found = RecordFolder.open(folder, IDENTITY)
            assert [len(journal.blocks) for journal in found.journals] == [done, 0]
            assert not found.complete
            with pytest.raises(KeyError, match=rf"which is not finished: {len(found)} records so far"):
                found[first]
            writer.append(first, records_of(first, count))
            found = RecordFolder.open(folder)
            found.verify()
            assert found[first + count - 1] == RECORDS[first + count - 1]
        writer.finish()
    assert [journal.end is not None for journal in RecordFolder.open(folder).journals] == [True, False]
    with pytest.raises(DataError, match=r"of 2 shards these are not: \[1\]\n  fix: run what writes it again"):
        commit(folder)
    assert not RecordFolder.open(folder).complete


class Killed(BaseException):
    """The process ends here: nothing may clean up."""


@contextlib.contextmanager
def killed_after(size, monkeypatch):
    """End the process after it has written `size` bytes of blocks and journals."""
    pwrite, left = os.pwrite, [size]

    def write_part(descriptor, data, offset):
        part = bytes(data)[: left[0]]
        left[0] -= len(part)
        if len(part) < len(data):
            pwrite(descriptor, part, offset)
            raise Killed
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", write_part)
        yield


def test_kill_at_every_byte_is_resumed_to_the_identical_folder(folder, tmp_path, monkeypatch):
    wanted, other = content_of(folder), tmp_path / "other"
    total = sum(len(data) for name, data in wanted.items() if name.startswith("shard"))
    for size in range(total):
        with killed_after(size, monkeypatch), pytest.raises(Killed):
            write(other)
        unfinished = RecordFolder.open(other)
        unfinished.verify()
        assert all(unfinished[key] == record for key, record in RECORDS.items() if key in unfinished)
        write(other)
        assert content_of(other) == wanted, f"killed after {size} bytes"
        shutil.rmtree(other)


@pytest.mark.parametrize("stop", [2, None])
def test_every_file_cut_at_every_length_is_resumed_to_the_identical_folder(folder, tmp_path, stop):
    wanted, start, other = content_of(folder), tmp_path / "start", tmp_path / "other"
    write(start, stop=stop)
    for file in sorted(start.iterdir()):
        if file.name == "identity.json":
            continue  # replaced as a whole: it is never shorter
        for size in range(file.stat().st_size):
            shutil.copytree(start, other)
            os.truncate(other / file.name, size)
            write(other)
            assert content_of(other) == wanted, f"{file.name} of {size} bytes"
            shutil.rmtree(other)


def test_kill_while_a_whole_file_is_replaced_leaves_no_trace(folder, tmp_path, monkeypatch):
    wanted, replace = content_of(folder), os.replace

    def kill(*paths):
        raise Killed

    for name in ("identity.json", "manifest.json"):
        other = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda a, b, name=name: kill() if Path(b).name == name else replace(a, b))
            with pytest.raises(Killed):
                write(other)
        assert not (other / name).exists()
        write(other)
        assert content_of(other) == wanted


SCRIPT = """
import sys
from pathlib import Path
from kdtrain.stores.record_writer import ShardWriter
with ShardWriter(Path(sys.argv[1]), {"a": 1}) as writer:
    for n in range(len(writer.blocks), int(sys.argv[2])):
        writer.append(8 * n, [bytes([n % 251]) * 999] * 8)
    writer.finish()
"""


def test_process_killed_by_a_signal_is_resumed_to_the_identical_folder(tmp_path):
    def run(name, blocks):
        return [sys.executable, "-c", SCRIPT, tmp_path / name, str(blocks)]

    done = 0
    for _ in range(3):
        process = subprocess.Popen(run("killed", 10**9))
        try:
            while not (tmp_path / "killed/identity.json").exists() or blocks_of(tmp_path / "killed") <= done:
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = blocks_of(tmp_path / "killed")
    for name in ("killed", "whole"):
        subprocess.run(run(name, done + 5), check=True)
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")


def blocks_of(folder):
    return len(RecordFolder.open(folder).journals[0].blocks)


def test_full_disk_keeps_every_block_and_the_writer_can_go_on(folder, tmp_path):
    wanted, other = content_of(folder), tmp_path / "other"
    for limit in range(1, max(len(data) for data in wanted.values()), 7):
        with contextlib.suppress(DataError), full_disk(limit):
            write(other)
        if (other / "identity.json").exists():
            found = RecordFolder.open(other)
            found.verify()
            assert all(found[key] == record for key, record in RECORDS.items() if key in found)
        write(other)
        assert content_of(other) == wanted
        shutil.rmtree(other)
    (first, count), (second, more), *_ = BLOCKS[0]
    with ShardWriter(other, IDENTITY, 0, 2) as writer:
        writer.append(first, records_of(first, count))
        with (
            full_disk(30),
            pytest.raises(DataError, match=r"(?s)writing failed: File too large\n  why: blocks written"),
        ):
            writer.append(second, [b"x" * 99])
        writer.append(second, records_of(second, more))
        assert len(writer.blocks) == 2
    write(other)
    assert content_of(other) == wanted


def test_error_of_the_disk_between_block_and_journal_is_undone(folder, tmp_path, monkeypatch):
    pwrite = os.pwrite

    def fail_on_journal(descriptor, data, offset):
        if b"sha256" in bytes(data):
            pwrite(descriptor, bytes(data)[:9], offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pwrite(descriptor, data, offset)

    (first, count), *_ = BLOCKS[0]
    with ShardWriter(tmp_path / "other", IDENTITY, 0, 2) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail_on_journal)
            with pytest.raises(DataError, match="Input/output error"):
                writer.append(first, records_of(first, count))
        assert writer.blocks == ()
        assert content_of(tmp_path / "other")["shard_00000.bin"] == b""
        assert content_of(tmp_path / "other")["shard_00000.journal"] == b""
    write(tmp_path / "other")
    assert content_of(tmp_path / "other") == content_of(folder)


def test_every_flipped_byte_is_found(folder):
    source = random.Random(1)
    for name, data in content_of(folder).items():
        for place in range(len(data)):
            changed = bytearray(data)
            changed[place] ^= 1 << source.randrange(8)
            (folder / name).write_bytes(changed)
            with pytest.raises(DataError, match=r"damaged|this kdtrain reads up to"):
                RecordFolder.open(folder).verify()
            if name.endswith(".bin"):
                found = RecordFolder.open(folder)
                with pytest.raises(DataError, match="the checksum of the record of key"):
                    [found[key] for key in RECORDS]
        (folder / name).write_bytes(data)
    RecordFolder.open(folder).verify()


def test_flipped_byte_of_an_unfinished_shard_is_found_by_reader_and_writer(tmp_path):
    write(tmp_path / "records", stop=2)
    file = tmp_path / "records/shard_00000.bin"
    data = bytearray(file.read_bytes())
    data[5] ^= 4
    file.write_bytes(data)
    with pytest.raises(DataError, match="the checksum of the block at byte 0 is wrong"):
        RecordFolder.open(tmp_path / "records").verify()
    with pytest.raises(DataError, match="the checksum of the block at byte 0 is wrong"):
        write(tmp_path / "records")


def test_missing_shortened_and_swapped_files_are_refused_by_name(folder, tmp_path):
    for name, data in content_of(folder).items():
        if name in ("manifest.json", "identity.json"):
            continue
        (folder / name).unlink()
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            RecordFolder.open(folder)
        (folder / name).write_bytes(data[:-1])
        with pytest.raises(DataError, match=f"{name} is damaged: {len(data) - 1} bytes, {len(data)} in the manifest"):
            RecordFolder.open(folder)
        (folder / name).write_bytes(data)
    for shard, first in ((0, 0), (1, 100)):
        with ShardWriter(tmp_path / "even", IDENTITY, shard, 2) as writer:
            writer.append(first, [b"same", b"bytes"])
            writer.finish()
    commit(tmp_path / "even")
    one, two = tmp_path / "even/shard_00000.bin", tmp_path / "even/shard_00001.bin"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    found = RecordFolder.open(tmp_path / "even")
    with pytest.raises(DataError, match=r"shard_00001.bin is damaged: the checksum of the record of key 101"):
        found[101]
    with pytest.raises(DataError, match=r"shard_00000.bin is damaged"):
        found.verify()


def test_another_identity_is_refused_by_field_with_both_values(folder):
    for change, message in (
        ({"corpus": "cd" * 32}, f"differ in corpus: {'ab' * 32} there, {'cd' * 32} here"),
        ({"packing": {"seq_len": 32, "sequence_prefix": [1]}}, r"differ in packing.seq_len: 16 there, 32 here"),
        (
            {"packing": {"seq_len": 16, "sequence_prefix": []}},
            r"differ in packing.sequence_prefix: \[1\] there, \[\] here",
        ),
        ({"temperature": 2.0}, r"differ in temperature: 1.0 there, 2.0 here"),
        ({"teacher": "x"}, r"differ in teacher: None there, x here"),
    ):
        with pytest.raises(StoreMismatch, match=message):
            RecordFolder.open(folder, {**IDENTITY, **change})
        with pytest.raises(StoreMismatch, match=message.replace("in ", "in identity.", 1)):
            ShardWriter(folder, {**IDENTITY, **change}, 0, 2)
    with pytest.raises(StoreMismatch, match="differ in shards: 2 there, 3 here"):
        ShardWriter(folder, IDENTITY, 0, 3)
    RecordFolder.open(folder, {**IDENTITY, "packing": {"seq_len": 16, "sequence_prefix": (1,)}})


def test_newer_format_and_other_folders_are_refused(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(record_folder, "VERSION", 2)
        ShardWriter(tmp_path / "newer", IDENTITY).close()
    with pytest.raises(DataError, match=r"version 2; this kdtrain reads up to version 1\n  fix: use the kdtrain"):
        RecordFolder.open(tmp_path / "newer")
    with pytest.raises(DataError, match=r"is not a folder of records: it has no identity.json"):
        RecordFolder.open(tmp_path)


def test_a_shard_has_one_writer_and_takes_nothing_when_it_is_finished(folder, tmp_path):
    with ShardWriter(tmp_path / "other", IDENTITY), pytest.raises(ConfigError, match="written by another process"):
        ShardWriter(tmp_path / "other", IDENTITY)
    with ShardWriter(folder, IDENTITY, 0, 2) as writer:
        assert writer.finished
        writer.finish()
        with pytest.raises(ValueError, match="is finished"):
            writer.append(99, [b"x"])
    with ShardWriter(tmp_path / "other", IDENTITY) as writer:
        for first, records in ((-1, [b"x"]), (1, [])):
            with pytest.raises(ValueError, match="are no block"):
                writer.append(first, records)
    with pytest.raises(ValueError, match="shard 2 of 2"):
        ShardWriter(folder, IDENTITY, 2, 2)


def test_a_key_in_two_blocks_is_refused_at_commit(tmp_path):
    for shard, first in ((0, 5), (1, 7)):
        with ShardWriter(tmp_path / "records", IDENTITY, shard, 2) as writer:
            writer.append(first, [b"a", b"b", b"c"])
            writer.finish()
    with pytest.raises(DataError, match=r"shard_00000.bin and shard_00001.bin both have the key 7"):
        commit(tmp_path / "records")
