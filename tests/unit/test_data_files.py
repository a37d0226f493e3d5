"""Which files become documents: files left out are logged, files of other formats are refused."""

import bz2
import gzip
import json
import lzma
import os

import pytest

from kdtrain.data.text import find_files, read_documents
from kdtrain.errors import ConfigError

LINE = b'{"text": "one"}\n{"text": "two"}\n'


def fill(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def names(files, folder):
    return [str(file.relative_to(folder)) for file in files]


def test_folder_is_read_in_any_case_through_links_and_other_files_are_counted(tmp_path, logged):
    other = fill(tmp_path / "other", h__txt=b"linked")
    corpus = fill(
        tmp_path / "corpus",
        a__txt=b"a",
        B__TXT=b"B",
        c__jsonl__zst=b"\x28\xb5\x2f\xfd",
        d__parquet=b"PAR1",
        e__ndjson=LINE,
        f__dat=b"f",
        g__json__bz2=bz2.compress(LINE),
        i__JSONL__GZ=gzip.compress(LINE),
        README=b"x",
        k__tar__xz=lzma.compress(b"tar"),
        l__DAT=b"l",
    )
    (corpus / "sub").symlink_to(other)
    (corpus / "gone.txt").symlink_to(tmp_path / "nowhere")
    found = find_files([corpus])
    assert names(found, corpus) == ["B.TXT", "a.txt", "e.ndjson", "i.JSONL.GZ", "sub/h.txt"]
    assert list(read_documents(found)) == ["B", "a", "one", "two", "one", "two", "linked"]
    (message,) = logged.messages
    assert f"{corpus}: 8 files are ignored" in message
    for part in (
        "2 .dat",
        "1 .zst",
        "1 .parquet",
        "1 .bz2",
        "1 .tar.xz",
        "1 without a suffix",
        "1 broken links and special files",
    ):
        assert part in message


def test_folder_without_other_files_logs_nothing(tmp_path, logged):
    find_files([fill(tmp_path / "corpus", a__txt=b"a", b__json__xz=lzma.compress(LINE))])
    assert not logged.messages


def test_link_cycles_end_and_every_file_is_read_once(tmp_path):
    corpus = fill(tmp_path / "corpus", a__txt=b"a")
    fill(corpus / "sub", b__txt=b"b")
    outside = fill(tmp_path / "outside/deep", c__txt=b"c").parent
    (corpus / "again").symlink_to(corpus / "sub")
    (corpus / "sub/up").symlink_to(corpus)
    (corpus / "self").symlink_to(corpus / "self")
    (corpus / "far").symlink_to(outside / "deep")
    (corpus / "further").symlink_to(outside)
    (outside / "back").symlink_to(corpus)
    assert names(find_files([corpus]), corpus) == ["a.txt", "far/c.txt", "sub/b.txt"]
    assert names(find_files([outside]), outside) == ["back/a.txt", "back/sub/b.txt", "deep/c.txt"]
    (tmp_path / "link").symlink_to(corpus)
    assert len(find_files([tmp_path / "link", corpus])) == 3


def test_a_pattern_that_matches_a_folder_names_what_is_in_it(tmp_path):
    corpus = fill(tmp_path / "corpus", a__txt=b"a")
    fill(corpus / "sub", b__txt=b"b", c__dat=b"c")
    assert names(find_files([corpus / "*"]), corpus) == ["a.txt", "sub/b.txt"]
    assert names(find_files([corpus / "**"]), corpus) == ["a.txt", "sub/b.txt", "sub/c.dat"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no text file"):
        find_files([tmp_path / "emp*"])


def test_a_folder_that_cannot_be_searched_is_an_error(tmp_path, monkeypatch):
    corpus = fill(tmp_path / "corpus", a__txt=b"a")
    closed = fill(corpus / "closed", b__txt=b"b")
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(closed))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ConfigError, match=r"closed: cannot be searched: Permission denied\n  fix: "):
        find_files([corpus])


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl.zst",
        "a.JSONL.ZST",
        "a.txt.bz2",
        "a.parquet",
        "a.zip",
        "a.tar.gz",
        "a.tgz",
        "a.arrow",
        "a.bin",
        "zst.7z",
    ],
)
def test_a_file_of_another_format_named_by_itself_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"plain enough")
    for entry in (tmp_path / name, tmp_path / "*"):
        with pytest.raises(ConfigError, match=r"files of \.\w+ are not read\n  why: .*\n  fix: turn it into") as caught:
            find_files([entry])
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "new"),
    [
        ("lines", LINE, "lines.jsonl"),
        ("lines.data", b"\n \n" + LINE, "lines.data.jsonl"),
        ("lines.data", b"\xef\xbb\xbf" + LINE, "lines.data.jsonl"),
        ("lines.data", json.dumps({"text": "x" * (3 << 20)}).encode() + b"\n" + LINE, "lines.data.jsonl"),
        ("lines.gz", gzip.compress(LINE), "lines.jsonl.gz"),
        ("lines.part.XZ", lzma.compress(LINE), "lines.part.jsonl.XZ"),
    ],
)
def test_json_lines_with_unknown_suffix_are_refused(tmp_path, name, content, new):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="begins with a line of JSON") as caught:
        find_files([path])
    assert f"fix: rename it to {new}, or to {new.replace('.jsonl', '.txt')} if it is one text" in str(caught.value)
    renamed = path.rename(tmp_path / new)
    assert list(read_documents(find_files([renamed])))[-2:] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", LINE),  # named as text, read as text
        ("a.py", b"x = {}\n"),
        ("a", b"12\n"),
        ("a.conf", b"[1, 2]\n"),
        ("a.css", b"{\n"),
        ("empty", b""),
    ],
)
def test_other_text_named_by_itself_is_one_document(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(read_documents(find_files([tmp_path / name]))) == ([content.decode()] if content else [])


def test_a_named_ndjson_file_holds_json_lines(tmp_path):
    for name, content in (("e.ndjson", LINE), ("F.NDJSON", LINE), ("g.ndjson.gz", gzip.compress(LINE))):
        (tmp_path / name).write_bytes(content)
        assert list(read_documents(find_files([tmp_path / name]))) == ["one", "two"]
