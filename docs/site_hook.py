"""MkDocs hook: pages from outside docs/, and links between files of the repository.

Links in the Markdown files are relative, so that they work where the repository is read. On the site they become links
between pages; a link to a file that is no page leads into `repo_url` or, without one, becomes text with the path.
A link to what does not exist is left as it is, and the strict build fails on it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
    "finds.md": "findings/README.md",
}
"""Page of the site -> file of the repository, for files outside docs/."""

FENCE = re.compile(r"^( *)(```+|~~~+).*?^ *\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\(([^()\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the files of PAGES to MkDocs's."""
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page's Markdown with links as the site needs them."""
    return site_links(markdown, page.file.src_uri, config.repo_url)


def site_links(markdown: str, page: str, repo_url: str | None) -> str:
    """`markdown` of the site's page `page` with its links to files of the repository rewritten, code left alone."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [_rewritten(markdown[end : fence.start()], page, repo_url), fence.group()]
        end = fence.end()
    return "".join([*parts, _rewritten(markdown[end:], page, repo_url)])


def _rewritten(text: str, page: str, repo_url: str | None) -> str:
    """`text`, which holds no fenced code, with its links rewritten."""
    here = posixpath.dirname(PAGES.get(page, f"docs/{page}"))
    pages = {source: name for name, source in PAGES.items()}

    def replace(link: re.Match[str]) -> str:
        label, (target, hash_, anchor) = link[1], link[2].partition("#")
        path = posixpath.normpath(posixpath.join(here, target))
        if re.match(r"[a-z]+:", target) or not target or not (ROOT / path).exists():
            return link.group()
        if path in pages or path.startswith("docs/"):
            found = posixpath.relpath(pages.get(path, path.removeprefix("docs/")), posixpath.dirname(page) or ".")
            return f"[{label}]({found}{hash_}{anchor})"
        if repo_url:
            return f"[{label}]({repo_url.rstrip('/')}/blob/main/{path}{hash_}{anchor})"
        return label if label.strip("`") == path else f"{label} (`{path}`)"

    return LINK.sub(replace, text)
