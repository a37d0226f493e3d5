"""The check of commit messages: rules by example, a range and the hook in a temporary repository."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci/commit_msg"
BODY = "\n\nReaders of the old file saw half of it after a kill.\n"
IDENTITY = {"NAME": "someone", "EMAIL": "someone@example.com"}
GIT = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture(scope="module")
def faults():
    return runpy.run_path(str(SCRIPT))["faults"]


@pytest.fixture
def repository(tmp_path):
    """A repository with the check and its hook; returns (git command -> its outcome, how to write a file)."""
    for name in (".ci/commit_msg", ".githooks/commit-msg"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    who = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in IDENTITY.items()}
    env = {**os.environ, **who, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # set where the tests themselves run in a git hook
        env.pop(name, None)

    def run(*words):
        return subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)

    def write(name, lines):
        (tmp_path / name).write_text("".join(f"line {number}\n" for number in range(lines)))
        assert run("git", "add", name).returncode == 0

    assert run("git", "init", "-q").returncode == 0
    return run, write


@pytest.mark.parametrize(
    ("message", "lines"),
    [
        ("Write manifests last" + BODY, 200),
        ("Write manifests last" + BODY, None),
        ("x" * 72 + BODY, 200),
        ("Embed rows, process blocks and focus on one" + BODY, 200),
        ("Correct a typo", 2),
        ("Correct a typo\n\nSigned-off-by: A Person <a@example.com>\n", 10),
        ('Revert "Added what was wrong."\n', 200),
        ("fixup! Write manifests last", 200),
        ("Merge branch 'layouts'", 200),
        ("Merge the two readers of manifests" + BODY, 200),
    ],
)
def test_good_messages_have_no_fault(faults, message, lines):
    assert faults(message, lines) == []


@pytest.mark.parametrize(
    ("message", "lines", "named"),
    [
        ("", 2, "the message is empty"),
        ("x" * 73 + BODY, 2, "the subject has 73 characters, at most 72"),
        ("Write manifests last." + BODY, 200, "the subject ends with a period"),
        *((f"{word} manifests" + BODY, 200, f'begins with "{word}"') for word in ("Added", "Adds", "adding", "Wrote")),
        ("Write manifests last\nReaders saw half of the file.", 200, "the second line is not empty"),
        ("Write manifests last", 11, "no body says why.*at most 10 lines.*changes 11"),
        ("Write manifests last", None, "no body says why"),
        ("Write manifests last\n\nSee above.\n", 200, "no body says why"),
        ("Write manifests last\n\nSigned-off-by: A Person <a@example.com>\n", 200, "no body says why"),
        ("Merge the two readers of manifests", 200, "no body says why"),
    ],
)
def test_bad_messages_have_one_fault(faults, message, lines, named):
    (fault,) = faults(message, lines)
    assert re.search(named, fault)


def test_comment_lines_and_the_diff_below_the_scissors_are_not_part_of_a_message(tmp_path):
    message = tmp_path / "COMMIT_EDITMSG"
    scissors = "# ------------------------ >8 ------------------------\n+ many words of a diff that are not a body\n"
    message.write_text("Write manifests last\n\n# On branch main, with many words in a comment\n" + scissors)
    done = check(message, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("commit_msg: no body says why")) == (1, 1)
    message.write_text("# comment\nWrite manifests last\n# comment" + BODY)
    assert check(message, cwd=tmp_path).returncode == 0


def check(word, cwd):
    command = [sys.executable, str(SCRIPT), str(word)]
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(cwd.parent)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)


@GIT
def test_every_commit_of_a_range_is_checked_but_merges(repository):
    run, write = repository
    write("a", 100)
    run("git", "commit", "-qm", "Added what is older than the range")
    run("git", "tag", "base")
    write("a", 98)
    run("git", "commit", "-qm", "Drop two lines")
    run("git", "checkout", "-qb", "side")
    write("b", 40)
    run("git", "commit", "-qm", "Write b")
    run("git", "checkout", "-q", "-")
    write("c", 40)
    run("git", "commit", "-qm", "Write c" + BODY)
    assert run("git", "merge", "-q", "--no-ff", "-m", "Joined both.", "side").returncode == 0
    done = run(sys.executable, ".ci/commit_msg", "base..HEAD")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"commit_msg: [0-9a-f]{10} 'Write b': no body says why.*changes 40", line)
    assert run(sys.executable, ".ci/commit_msg", "HEAD~1..HEAD^2").returncode == 1
    assert run(sys.executable, ".ci/commit_msg", "HEAD^2..HEAD").returncode == 0
    done = run(sys.executable, ".ci/commit_msg", "nowhere..HEAD")
    assert (done.returncode, "nowhere..HEAD" in done.stderr) == (2, True)


@GIT
def test_the_hook_refuses_a_commit_and_lets_a_good_one_pass(repository):
    run, write = repository
    run("git", "config", "core.hooksPath", ".githooks")
    write("a", 40)
    done = run("git", "commit", "-qm", "Write a")
    assert done.returncode != 0
    assert "no body says why" in done.stderr
    assert run("git", "commit", "-qm", "Write a" + BODY).returncode == 0
    write("a", 38)
    assert run("git", "commit", "-qm", "Drop two lines").returncode == 0, "the staged diff is of two lines"
