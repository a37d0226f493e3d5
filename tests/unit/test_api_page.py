"""docs/api.md lists the public names, which are those of each package's __all__."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## `(kdtrain\.\w+)`\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))


def test_page_has_the_packages_with_public_names():
    assert list(SECTIONS) == [f"kdtrain.{name}" for name in ("losses", "teacher", "data", "models", "parallel")]


@pytest.mark.parametrize("package", SECTIONS)
def test_page_lists_the_public_names_of_a_package_and_each_can_be_imported(package):
    listed = re.findall(r"^\| `(\w+)` \|", SECTIONS[package], flags=re.M)
    module = importlib.import_module(package)
    assert sorted(listed) == sorted(module.__all__)
    for name in listed:
        assert getattr(module, name).__doc__, f"{package}.{name} has no docstring"


def test_packages_that_a_configuration_error_needs_import_neither_torch_nor_numpy():
    code = (
        "import sys, kdtrain, kdtrain.config.cli, kdtrain.config.load, kdtrain.log, kdtrain.errors\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
