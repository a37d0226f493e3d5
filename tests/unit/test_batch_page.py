"""docs/design/0017-one-batch-through-the-code.md names files that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/design/0017-one-batch-through-the-code.md"


def test_every_file_on_the_page_exists():
    names = re.findall(r"`((?:kdtrain|kernels|launch|tests)/[\w/.]+)`", PAGE.read_text(encoding="utf-8"))
    assert len(names) > 50
    assert [name for name in names if not (ROOT / name).is_file()] == []
