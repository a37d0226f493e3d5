"""The command line of launch/prepare_corpus.py: its options, and which exclude each other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parse_prepare(description: str | None, argv: Sequence[str]) -> argparse.Namespace:
    """Options by name. Exits with code 2 and a message, as argparse does, for options that exclude each other."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="holds tokenizer.json, e.g. the teacher")
    parser.add_argument("--output", required=True, metavar="DIR", help="will hold train/ and validation/")
    help_ = "token after each document (default: <|endoftext|>, else the tokenizer's document end; which one is logged)"
    parser.add_argument("--separator", metavar="TOKEN", help=help_)
    help_ = "before each document: what the tokenizer puts before a text (auto), nothing (never), or this token"
    parser.add_argument("--bos", metavar="auto|never|TOKEN", default="auto", help=f"{help_} (default: auto)")
    help_ = "cut a document after each separator inside it, or keep it whole (default: refused)"
    parser.add_argument("--inner-separators", choices=["split", "keep"], help=help_)
    of_text = _add_text(parser)
    of_pairs = _add_megatron(parser)
    a = parser.parse_args(argv)
    if not 0 <= a.validation_share < 1:
        parser.error(f"--validation-share {a.validation_share} is not in [0, 1)")
    if a.workers is not None and a.workers < 1:
        parser.error(f"--workers {a.workers} is not at least 1")
    if a.from_megatron and a.validation_share:
        parser.error("--from-megatron cannot hold out a share: documents are chosen by their text")
    if a.from_megatron and (given := _given(a, of_text)):
        parser.error(f"--from-megatron cannot be used with {given}: pairs hold tokens, not text")
    if not a.from_megatron and (given := _given(a, of_pairs)):
        parser.error(f"{given} needs --from-megatron: a text is not a Megatron pair")
    return a


def _add_text(parser: argparse.ArgumentParser) -> list[str]:
    """Add options about text; returns the names of those that exclude --from-megatron."""
    group = parser.add_argument_group("text")
    group.add_argument("--validation-share", type=float, default=0.0, help="share of documents held out, in [0, 1)")
    group.add_argument("--field", help="key of the text in JSON lines (default: text)")
    group.add_argument("--errors", choices=["strict", "replace"], help="what to do on invalid UTF-8 (default: strict)")
    help_ = "leave out what cannot be read (null or missing text, invalid JSON or UTF-8) and count it by reason"
    group.add_argument("--skip-invalid", action="store_true", default=None, help=help_)
    group.add_argument("--split-on", metavar="LINE", help="line between documents of a text file ('': blank lines)")
    group.add_argument("--workers", type=int, help="number of processes (default: one per core)")
    return ["--field", "--errors", "--skip-invalid", "--split-on", "--workers"]


def _add_megatron(parser: argparse.ArgumentParser) -> list[str]:
    """Add options about Megatron pairs; returns the names of those that need --from-megatron."""
    group = parser.add_argument_group("Megatron pairs")
    help_ = "INPUT are prefixes of .bin/.idx pairs; all become train/"
    group.add_argument("--from-megatron", action="store_true", help=help_)
    help_ = (
        "what a document is: an entry of the document index, a sequence, or what stands between separators in the "
        "stream of all sequences (default: index, refused where the tokens contradict it)"
    )
    group.add_argument("--documents-from", choices=["index", "sequences", "stream"], help=help_)
    help_ = "read every token but copy none: the store refers to the pairs' .bin files (refused if one needs a change)"
    group.add_argument("--in-place", action="store_true", default=None, help=help_)
    return ["--documents-from", "--in-place"]


def _given(options: argparse.Namespace, names: Sequence[str]) -> str:
    found = [name for name in names if getattr(options, name[2:].replace("-", "_")) is not None]
    return ", ".join(found)
