"""docs/results/field_reports.md names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/results/field_reports.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_named_test_is_there(file, name):
    assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_every_fault_has_a_row_with_a_test():
    answered = {fault for row in ROWS if "`tests/" in row for fault in re.findall(r"\b[FD]\d+\b", row.split("|")[1])}
    assert answered >= {f"F{n}" for n in range(1, 20)} | {"D1", "D2", "D7", "D8", "D10", "D14"}
