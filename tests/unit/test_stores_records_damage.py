"""Folders of records after two writers, a lost file or a loss of power: in order, or refused with what is wrong."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from kdtrain.errors import DataError, StoreMismatch
from kdtrain.stores import record_writer
from kdtrain.stores.files import StoredFile
from kdtrain.stores.journal import LONGEST_LINE, Block, journal_line
from kdtrain.stores.record_folder import RecordFolder
from kdtrain.stores.record_writer import ShardWriter

RECORDS = [b"abc" * 7, b"", b"defgh"]


def write(folder, *, finish=False):
    with ShardWriter(folder, {"seed": 1}) as writer:
        writer.append(4, RECORDS)
        if finish:
            writer.finish()
    return folder / "shard_00000.journal"


def test_bytes_are_on_disk_before_the_line_that_names_them_and_so_is_every_new_name(tmp_path, monkeypatch):
    events, pwrite = [], os.pwrite
    root = tmp_path.resolve()

    def name(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(root.parent).as_posix()

    monkeypatch.setattr(os, "pwrite", lambda *args: events.append(("write", name(args[0]))) or pwrite(*args))
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(("sync", name(descriptor))))
    folder = tmp_path / "new/records"
    with ShardWriter(folder, {"seed": 1}) as writer:
        made = [of for what, of in events if what == "sync"]
        assert {root.name, f"{root.name}/new", f"{root.name}/new/records"} <= set(made)
        assert made[-1] == f"{root.name}/new/records", "the names of shard and journal"
        events.clear()
        writer.append(4, RECORDS)
    shard, journal = (f"{root.name}/new/records/shard_00000.{kind}" for kind in ("bin", "journal"))
    assert events == [("write", shard), ("sync", shard), ("write", journal), ("sync", journal)]


def test_shards_without_an_identity_are_not_given_another(tmp_path):
    write(tmp_path / "records")
    (tmp_path / "records/identity.json").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    with pytest.raises(DataError, match=r"has shard_00000\.\w+, but no identity\.json\n  why: what its records"):
        ShardWriter(tmp_path / "records", {"seed": 2})
    assert {path.name: path.read_bytes() for path in (tmp_path / "records").iterdir()} == before


def test_of_writers_that_begin_together_the_second_keeps_the_identity_of_the_first(tmp_path, monkeypatch):
    replace, inside, other_done = record_writer._replace, Event(), Event()

    def slow(path, data, unique):
        if unique == "00000":
            inside.set()
            other_done.wait(0.3)  # passes if the other writer can come in between
        replace(path, data, unique)

    def second():
        inside.wait(10)
        try:
            ShardWriter(tmp_path / "records", {"seed": 2}, 1, 2).close()
        finally:
            other_done.set()

    monkeypatch.setattr(record_writer, "_replace", slow)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second)
        ShardWriter(tmp_path / "records", {"seed": 1}, 0, 2).close()
        with pytest.raises(StoreMismatch, match=r"differ in identity\.seed: 1 there, 2 here"):
            waiting.result(10)
    assert RecordFolder.open(tmp_path / "records").identity == {"seed": 1}
    assert not (tmp_path / "records/shard_00001.journal").exists()


@pytest.mark.parametrize("finish", [False, True])
def test_a_journal_with_lines_twice_is_refused_with_the_line(tmp_path, finish):
    journal = write(tmp_path / "records", finish=finish)
    lines = journal.read_bytes()
    journal.write_bytes(lines * 2)
    for use in (RecordFolder.open, lambda folder: ShardWriter(folder, {"seed": 1})):
        with pytest.raises(DataError, match=rf"line {2 + finish} does not follow the one before it"):
            use(tmp_path / "records")
    assert journal.read_bytes() == lines * 2


def test_a_journal_that_became_zeros_does_not_cut_off_its_shard(tmp_path):
    with ShardWriter(tmp_path / "records", {"seed": 1}) as writer:
        for number in range(8):
            writer.append(8 * number, RECORDS)
        assert len(journal_line(Block(*[(1 << 63) - 1] * 4, "f" * 64))) < LONGEST_LINE
        assert len(journal_line(StoredFile("shard_99999.bin", (1 << 63) - 1, "f" * 64))) < LONGEST_LINE
    journal, shard = (tmp_path / f"records/shard_00000.{kind}" for kind in ("journal", "bin"))
    data = shard.read_bytes()
    journal.write_bytes(bytes(journal.stat().st_size))
    for use in (RecordFolder.open, lambda folder: ShardWriter(folder, {"seed": 1})):
        with pytest.raises(DataError, match=r"journal is damaged: \d+ bytes at its end are no line"):
            use(tmp_path / "records")
    assert shard.read_bytes() == data


def test_keys_that_no_tensor_can_hold_are_refused(tmp_path):
    largest = (1 << 63) - 1
    with ShardWriter(tmp_path / "records", {"seed": 1}) as writer:
        for first, records in ((largest + 1, [b"x"]), (largest, [b"x", b"y"]), (1 << 64, [b"x"])):
            with pytest.raises(ValueError, match=f"from key {first} are no block"):
                writer.append(first, records)
        assert writer.blocks == ()
        writer.append(largest - 1, [b"x", b"y"])
    assert RecordFolder.open(tmp_path / "records")[largest] == b"y"


def test_system_calls_that_return_less_than_asked_for_are_repeated(tmp_path, monkeypatch):
    write(tmp_path / "records")
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 5), offset))
    found = RecordFolder.open(tmp_path / "records")
    found.verify()
    assert [found[4 + number] for number in range(len(RECORDS))] == RECORDS
    with ShardWriter(tmp_path / "records", {"seed": 1}) as writer:
        assert len(writer.blocks) == 1
