"""Files with checksums, and the two ways in which a finished folder gets its name."""

import hashlib
import resource

import numpy as np
import pytest

from kdtrain.stores.checksums import ChecksummedFile, sha256_of, sha256_of_json
from kdtrain.stores.folders import publish


def test_size_and_checksum_are_those_of_the_bytes_on_disk(tmp_path):
    blocks = [b"head", np.arange(70_000, dtype=np.int32).data, np.zeros(0, dtype=np.int32).data, b"x" * 8192]
    with ChecksummedFile(tmp_path / "a.bin") as file:
        for block in blocks:
            file.write(block)
        digest = file.commit()
    written = (tmp_path / "a.bin").read_bytes()
    assert written == b"".join(bytes(block) for block in blocks)
    assert (file.size, digest) == (len(written), hashlib.sha256(written).hexdigest())
    assert sha256_of(tmp_path / "a.bin") == digest


def test_error_of_failed_write_survives_closing_the_file(tmp_path):
    def write() -> None:
        with ChecksummedFile(tmp_path / "a.bin") as file:
            file.write(b"x" * 200)
            file.commit()

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_checksum_of_settings_does_not_depend_on_order_of_keys():
    assert sha256_of_json({"a": 1, "b": [2]}) == sha256_of_json({"b": [2], "a": 1}) != sha256_of_json({"a": 1})


def make(folder, content):
    folder.mkdir()
    (folder / "data").write_text(content)
    return folder


def test_published_folder_never_overwrites_another(tmp_path):
    final = make(tmp_path / "final", "old")
    with pytest.raises(OSError, match="not empty"):
        publish(make(tmp_path / ".new", "new"), final)
    assert (final / "data").read_text() == "old"


def test_published_folder_retires_the_former_one(tmp_path):
    final, retired = make(tmp_path / "final", "old"), make(tmp_path / ".retired", "older")
    publish(make(tmp_path / ".new", "new"), final, retired)
    assert [(folder / "data").read_text() for folder in (final, retired)] == ["new", "old"]
    publish(make(tmp_path / ".next", "next"), tmp_path / "other", tmp_path / ".absent")
    assert not (tmp_path / ".absent").exists()
