"""A file as its manifest describes it: the size without reading, the checksum of every byte."""

import hashlib

import pytest

from kdtrain.stores.files import StoredFile


def test_size_and_checksum_are_compared(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"content")
    file = StoredFile("a.bin", 7, hashlib.sha256(b"content").hexdigest())
    assert file.size_found(tmp_path) == 7
    assert file.other_sha256(tmp_path) is None
    (tmp_path / "a.bin").write_bytes(b"Content!")
    assert file.size_found(tmp_path) == 8
    assert file.other_sha256(tmp_path) == hashlib.sha256(b"Content!").hexdigest()


def test_a_file_that_is_none_is_missing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("nowhere", "folder", "loop", "folder/below/it"):
        with pytest.raises(FileNotFoundError):
            StoredFile(name, 0, "").size_found(tmp_path)
