"""tests/README.md: its table names every test file and none that is missing; rules that code can check."""

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
FOLDERS = ("unit", "distributed", "integration")
FILES = sorted(path for folder in FOLDERS for path in (TESTS / folder).glob("test_*.py"))


def named_patterns():
    """(folder, pattern) of every name in the table, in its column."""
    page = (TESTS / "README.md").read_text(encoding="utf-8").partition("| law | unit |")[2]
    rows = [line.strip("| ").split(" |") for line in page.splitlines()[2:] if line.startswith("|")]
    return [
        (folder, name)
        for row in rows
        for folder, cell in zip(FOLDERS, row[1:], strict=False)
        for name in re.findall(r"`([^`]+)`", cell)
    ]


def test_table_names_every_test_file_and_only_existing_ones():
    patterns = named_patterns()
    assert len(patterns) > 40
    found = {(path.parent.name, path.stem) for path in FILES}
    unmatched = [(f, p) for f, p in patterns if not any(folder == f and fnmatch(s, p) for folder, s in found)]
    assert not unmatched, "named in the table, but there is no such file"
    missing = [(f, s) for f, s in found if not any(folder == f and fnmatch(s, p) for folder, p in patterns)]
    assert not missing, "in no row of the table"


def test_no_test_file_loads_another():
    others = {path.stem for path in FILES}
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".py"):
                names = [Path(node.value).stem]
            used = {name.rpartition(".")[2] for name in names} & (others - {path.stem})
            assert not used, f"{path.relative_to(TESTS)}:{node.lineno} uses {sorted(used)}"
