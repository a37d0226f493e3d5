"""Links between the Markdown files of the repository, and the strict build of the documentation site."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "findings/README.md")
NEEDS_MKDOCS = pytest.mark.skipif(
    importlib.util.find_spec("material") is None,
    reason="mkdocs-material is not installed: pip install -c constraints-cpu.txt '.[docs]'",
)


def without_code(text):
    """Markdown without its fenced blocks and inline code."""
    text = re.sub(r"^ *(```+|~~~+).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "code", text)


def anchors(path):
    """Anchors of the headings in a Markdown file, as the hosting platforms make them."""
    text = re.sub(r"^ *(```+|~~~+).*?^ *\1 *$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = []
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)?$", text, flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        seen = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{seen}" if seen else slug)
    return found


def dead_links(path):
    """Links of a Markdown file to files and headings that do not exist."""
    text = without_code(path.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(<?([^()\s>]+)>?[^()]*\)", text)
    targets += re.findall(r"^ *\[[^\]]+\]: *(\S+)", text, flags=re.MULTILINE)
    dead = []
    for link in targets:
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = path.parent / target if target else path
        if not file.exists() or (anchor and (file.suffix != ".md" or anchor not in anchors(file))):
            dead.append(link)
    return dead


def test_every_relative_link_and_anchor_resolves():
    files = [*(ROOT / name for name in OUTSIDE), *sorted((ROOT / "docs").rglob("*.md"))]
    dead = {str(path.relative_to(ROOT)): found for path in files if (found := dead_links(path))}
    assert not dead


def test_links_to_missing_files_and_headings_are_found(tmp_path):
    (tmp_path / "b.md").write_text("# A `b`, twice\n## Two: parts\n## Two parts\n```\n# no heading\n```\n")
    (tmp_path / "a.md").write_text(
        "[1](b.md) [2](b.md#a-b-twice) [3](b.md#two-parts-1) [4](https://example.com/x) `[5](code.md)`\n"
        "```\n[6](fenced.md)\n```\n[7](c.md) [8](b.md#no-heading) [9](#nowhere)\n\n[ref]: d.md\n"
    )
    assert dead_links(tmp_path / "a.md") == ["c.md", "b.md#no-heading", "#nowhere", "d.md"]


def test_links_between_pages_and_to_files_are_rewritten_for_the_site():
    site_links = runpy.run_path(str(ROOT / "docs/site_hook.py"))["site_links"]
    readme = "[a](docs/clusters.md#x), [b](CONTRIBUTING.md), [c](launch/train.py), [d](docs/none.md), [e](#y)"
    assert site_links(readme, "index.md", None) == (
        "[a](clusters.md#x), [b](contributing.md), c (`launch/train.py`), [d](docs/none.md), [e](#y)"
    )
    note = (
        "[finds](../../findings/README.md) [1](../gpu.md)\n```\n[2](../../README.md)\n```\n[`setup.py`](../../setup.py)"
    )
    expected = "[finds](../finds.md) [1](../gpu.md)\n```\n[2](../../README.md)\n```\n`setup.py`"
    assert site_links(note, "design/0001-layers-and-doors.md", None) == expected
    linked = site_links("[1](../setup.py)", "gpu.md", "https://example.com/kdtrain/")
    assert linked == "[1](https://example.com/kdtrain/blob/main/setup.py)"


def build(root, site):
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=200, check=False)


@NEEDS_MKDOCS
def test_the_strict_build_makes_a_page_of_every_file(tmp_path):
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    missing = [str(page) for page in pages if not (tmp_path / "site" / page / "index.html").is_file()]
    assert not missing
    assert "kd_weight" in (tmp_path / "site/index.html").read_text(encoding="utf-8"), "the home page is the README"
    assert not list((tmp_path / "site").rglob("*.py*"))


@NEEDS_MKDOCS
@pytest.mark.parametrize("link", ["[gone](gone.md)", "[gone](gpu.md#gone)", "[gone](../launch/gone.py)"])
def test_a_dead_link_fails_the_strict_build(tmp_path, link):
    for name in ("mkdocs.yml", *OUTSIDE):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs/models.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{link}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "gone" in done.stdout + done.stderr
