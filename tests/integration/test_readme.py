"""Every block that the README marks as tested is run; every path and link in it exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_block_marked_tested_runs():
    blocks = re.findall(r"<!-- tested -->\n```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    assert README.count("<!-- tested -->") == len(blocks), "only python blocks can be run"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_file_the_readme_names_exists():
    named = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(
        r"(?:launch|configs|benchmarks)/[\w/]+\.(?:py|sh|yaml)", README
    )
    assert named
    for path in named:
        assert (ROOT / path).exists(), path
