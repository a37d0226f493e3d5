"""Make kdtrain/assets/demo from two Debian packages, public-domain text only.

    apt-get download sqlite3-doc r-cran-janeaustenr
    pip install rdata
    python examples/make_demo_corpus.py sqlite3-doc_*.deb r-cran-janeaustenr_*.deb

Writes sqlite.jsonl.xz and austen.jsonl.xz, one JSON object per line with "text" and "source", and SOURCES.md. Menus,
footers, machine-made indices and repeated pages are dropped: a document that mostly repeats others would leak held-out
text into training.
"""

import argparse
import collections
import hashlib
import html
import json
import lzma
import re
import subprocess
import tempfile
import zlib
from html.parser import HTMLParser
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent.parent / "kdtrain/assets/demo"
MIN_CHARACTERS = 400
MAX_SEEN = 0.3  # share of a document's characters that may occur in shorter ones
MAX_PAGES = 10  # a paragraph on more pages than this is boilerplate
INDEX_PAGES = re.compile(
    r"^(doc_.*|.*_index|requirements|matrix.*|toc.*|sitemap)\.html$"
)  # made by machine: lists of links
FOOTERS = re.compile(
    r"\n+(This page last modified on .*|See also lists of\s+Objects,\s+Constants, and\s+Functions\.)\s*$"
)
BLOCKS = {"p", "div", "li", "h1", "h2", "h3", "h4", "tr", "br", "pre", "dt", "dd", "table", "blockquote"}
SKIPPED = {"script", "style", "head", "svg"}


class PageText(HTMLParser):
    """Text of a page of the SQLite documentation, without its menu."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.skipping, self.depth = [], 0, 0

    def handle_starttag(self, tag, attrs):
        classes = dict(attrs).get("class") or ""
        is_menu = tag == "div" and re.search(r"menu|nosearch|searchmenu|tagline|logo", classes)
        if tag in SKIPPED or is_menu or self.skipping:
            self.skipping += tag == "div" or tag in SKIPPED
        elif tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        if self.skipping and (tag == "div" or tag in SKIPPED):
            self.skipping -= 1
        elif tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.skipping:
            self.parts.append(data)


def sqlite_documents(deb: Path, folder: Path):
    subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], check=True)
    documents = []
    root = folder / "usr/share/doc/sqlite3"
    for page in sorted(root.rglob("*.html")):
        if not INDEX_PAGES.match(page.name):
            parser = PageText()
            parser.feed(page.read_text(encoding="utf-8", errors="replace"))
            text = FOOTERS.sub("", FOOTERS.sub("", tidy("".join(parser.parts))))
            documents.append({"text": text, "source": f"sqlite3-doc/{page.relative_to(root)}"})
    return [d for d in without_repeats(documents) if len(d["text"]) >= MIN_CHARACTERS and "\ufffd" not in d["text"]]


def without_repeats(documents: list[dict]):
    """Documents in their order, without boilerplate and without those that repeat others (shorter ones are kept
    first)."""
    pages = collections.Counter(p for d in documents for p in set(paragraphs(d["text"])))
    for document in documents:
        kept = [p for p in document["text"].split("\n\n") if pages[normal(p)] <= MAX_PAGES]
        document["text"] = "\n\n".join(kept).strip()
    seen, repeats = set(), set()
    for document in sorted(documents, key=lambda d: (len(d["text"]), d["source"])):
        parts = paragraphs(document["text"])
        if sum(len(p) for p in parts if p in seen) > MAX_SEEN * sum(map(len, parts)):
            repeats.add(document["source"])
        else:
            seen.update(parts)
    return [d for d in documents if d["source"] not in repeats]


def paragraphs(text: str) -> list[str]:
    return [normal(p) for p in text.split("\n\n") if len(p) > 60]


def normal(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def tidy(text: str) -> str:
    lines = [re.sub(r"[ \t\u00a0]+", " ", line).strip() for line in html.unescape(text).splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def austen_documents(deb: Path, folder: Path):
    """Chapters of the six novels: the package keeps them in R's lazy-load database."""
    import rdata

    subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], check=True)
    data = next(folder.rglob("Rdata.rdb")).parent
    parsed = rdata.parser.parse_data(zlib.decompress((data / "Rdata.rdx").read_bytes(), 31))
    index = rdata.conversion.convert(parsed)["variables"]
    raw = (data / "Rdata.rdb").read_bytes()
    for name in sorted(index):
        start, size = (int(v) for v in index[name])
        packed = raw[start : start + size]
        lines = rdata.conversion.convert(rdata.parser.parse_data(zlib.decompress(packed[4:])))
        yield from chapters(name, [str(line) for line in lines])


def chapters(name: str, lines: list[str]):
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
    for number, chapter in enumerate(re.split(r"\n(?=(?:CHAPTER|Chapter) )", text)):
        # single line breaks come from the printed page, not from the text
        flowing = re.sub(r"(?<!\n)\n(?!\n)", " ", chapter).strip()
        if len(flowing) >= MIN_CHARACTERS:
            yield {"text": flowing, "source": f"austen/{name}/{number}"}


def write(documents, path: Path) -> tuple[int, int]:
    seen, lines = set(), []
    for document in documents:
        digest = hashlib.sha256(document["text"].encode()).digest()
        if digest not in seen:
            seen.add(digest)
            lines.append(json.dumps(document, ensure_ascii=False))
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    return len(lines), len(data)


SOURCES = """# The demo corpus

Public-domain English text, one JSON object per line ("text", "source"), xz-compressed. Made by
`python examples/make_demo_corpus.py` from two Debian packages:

| file | documents | bytes of JSON | sha256 of the file | from | rights |
| --- | ---: | ---: | --- | --- | --- |
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sqlite_deb", type=Path)
    parser.add_argument("austen_deb", type=Path)
    request = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    rows = SOURCES
    for name, deb, reader, origin, rights in (
        (
            "sqlite.jsonl.xz",
            request.sqlite_deb,
            sqlite_documents,
            "sqlite3-doc: documentation of SQLite",
            "dedicated to the public domain by its authors",
        ),
        (
            "austen.jsonl.xz",
            request.austen_deb,
            austen_documents,
            "r-cran-janeaustenr: six novels by Jane Austen",
            "text in the public domain (Project Gutenberg); the package around it is MIT",
        ),
    ):
        with tempfile.TemporaryDirectory() as folder:
            count, size = write(reader(deb, Path(folder)), OUTPUT / name)
        digest = hashlib.sha256((OUTPUT / name).read_bytes()).hexdigest()
        rows += f"| {name} | {count:,} | {size:,} | `{digest}` | {origin} ({deb.name}) | {rights} |\n"
        print(name, count, "documents", size, "bytes", (OUTPUT / name).stat().st_size, "compressed")
    (OUTPUT / "SOURCES.md").write_text(rows, encoding="utf-8")


if __name__ == "__main__":
    main()
