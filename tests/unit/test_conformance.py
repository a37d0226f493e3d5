"""Verdicts and tables of the conformance check, subjects that cannot run, and the published table."""

import re
from pathlib import Path

import pytest

from kdtrain.testing.conformance import Finding, Mode, Subject, check, table
from kdtrain.testing.ranks import load_file

ROOT = Path(__file__).resolve().parents[2]


def finding(**changes):
    values = {"loss_error": 1e-7, "norm_ratio": 1.0, "cosine": 1.0}
    return Finding(subject="a", mode="forward_kl tau=1", tp=4, gradient="student", **{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "right"),
        ({"loss_error": 1e-3}, "wrong value"),
        ({"loss_error": float("nan")}, "wrong value"),
        ({"cosine": 0.9}, "wrong direction"),
        ({"cosine": float("nan")}, "wrong direction"),
        ({"norm_ratio": 4.0}, "4 times too long"),
        ({"norm_ratio": 0.25}, "4 times too short"),
        ({"norm_ratio": 1.3}, "wrong length"),
    ],
)
def test_the_verdict_is_the_first_error(changes, verdict):
    assert finding(**changes).verdict == verdict


def test_the_table_has_tp_side_by_side_and_the_tp_of_errors():
    wrong = Finding("a", "m", 2, "student", 1e-7, 2.0, 1.0)
    right = Finding("a", "m", 1, "student", 2e-7, 1.0, 1.0)
    last = table([right, wrong]).splitlines()[-1]
    assert last == "| a | m | student | 2.0e-07 | 1.0000 / 2.0000 | 1.000000 | 2 times too long at tp 2 |"


def test_a_mode_shows_its_parameters():
    assert str(Mode("jsd", 2.0, {"teacher_share": 0.3})) == "jsd tau=2 teacher_share=0.3"


def test_invalid_declarations_are_refused():
    with pytest.raises(ValueError, match="reduction = 'average', need one of sum, mean"):
        Subject(name="a", loss=finding, reduction="average")
    with pytest.raises(ValueError, match="tp = 5, need a divisor of the vocabulary's 96 ids"):
        check(finding, tp=(5,))


def test_a_subject_reports_its_missing_package():
    subject = Subject(name="a", loss=finding, needs=("json", "no_such_package_of_mine"))
    assert subject.absent() == "ModuleNotFoundError: No module named 'no_such_package_of_mine'"
    assert Subject(name="a", loss=finding, needs=("json",)).absent() == ""


def test_the_published_table_has_every_subject_and_mode_and_ours_are_right():
    text = (ROOT / "docs/results/conformance.md").read_text(encoding="utf-8")
    subjects = load_file(ROOT / "proofs/conformance_subjects.py").SUBJECTS
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    for subject in subjects:
        absent = re.search(rf"^- {re.escape(subject.name)}: ", text, re.MULTILINE)
        modes = [row[1] for row in rows if row[0] == subject.name]
        assert absent or set(modes) == {str(mode) for mode in subject.modes}, subject.name
    ours = [row for row in rows if row[0].startswith("kdtrain ")]
    assert {row[-1] for row in ours} == {"right"}
