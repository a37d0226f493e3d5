"""Turn text into token stores.   python launch/prepare_corpus.py --tokenizer DIR --output DIR INPUT [INPUT ...]

INPUT: text files (one document each), .jsonl and .ndjson files (one document per line), either also .xz or .gz,
patterns, folders;
with --from-megatron prefixes of Megatron .bin/.idx pairs. The result does not depend on the number of workers.
"""

import argparse
import sys

from kdtrain.config.cli import run_script


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="holds tokenizer.json, e.g. the teacher")
    parser.add_argument("--output", required=True, metavar="DIR", help="will hold train/ and validation/")
    parser.add_argument("--validation-share", type=float, default=0.0, help="share of documents held out, in [0, 1)")
    parser.add_argument("--separator", metavar="TOKEN", help="after each document (<|endoftext|>, else eos_token)")
    parser.add_argument("--bos", choices=["auto", "never"], default="auto", help="before each document what the "
                        "tokenizer puts before a text, or nothing (default: %(default)s)")  # fmt: skip
    parser.add_argument("--field", help="of JSON lines (default: text)")
    parser.add_argument("--errors", choices=["strict", "replace"], help="on invalid UTF-8 (default: strict)")
    parser.add_argument("--split-on", metavar="LINE", help="between documents of a text file ('': blank lines)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--from-megatron", action="store_true", help="INPUT are Megatron prefixes; all become train/")
    a = parser.parse_args(argv)
    if not 0 <= a.validation_share < 1:
        parser.error(f"--validation-share {a.validation_share} is not in [0, 1)")
    if a.workers is not None and a.workers < 1:
        parser.error(f"--workers {a.workers} is not at least 1")
    if a.from_megatron and a.validation_share:
        parser.error("--from-megatron cannot hold out a share: documents are chosen by their text")
    of_text = {"--field": a.field, "--errors": a.errors, "--split-on": a.split_on, "--workers": a.workers}
    given = [name for name, value in of_text.items() if value is not None]
    if a.from_megatron and given:
        parser.error(f"--from-megatron does not go with {', '.join(given)}: pairs hold tokens, no text to read")

    from kdtrain.data.prepare import PrepareSettings, import_megatron, prepare_corpus
    from kdtrain.log import setup_logging

    setup_logging()
    if a.from_megatron:
        made = import_megatron(a.inputs, a.tokenizer, a.output, a.separator, a.bos)
    else:
        settings = PrepareSettings(
            "text" if a.field is None else a.field, a.errors or "strict", a.validation_share, a.separator, a.workers,
            a.split_on, a.bos,
        )  # fmt: skip
        made = prepare_corpus(a.inputs, a.tokenizer, a.output, settings)
    for name, manifest in made.items():
        print(f"{a.output}/{name}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
