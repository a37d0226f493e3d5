"""Turn text into token stores.   python launch/prepare_corpus.py --tokenizer DIR --output DIR INPUT [INPUT ...]

INPUT: text files (one document each), .jsonl files (one document per line), either also .xz or .gz, or folders.
"""

import argparse
import sys

from kdtrain.config.cli import run_script


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json, e.g. the teacher's")
    parser.add_argument("--output", required=True, help="folder to hold train/ and validation/")
    parser.add_argument("--validation-share", type=float, default=0.0, help="share of documents held out, in [0, 1)")
    parser.add_argument("--separator", help="token after each document (default <|endoftext|>, else eos_token)")
    parser.add_argument("--field", default="text", help="of JSON lines (default %(default)s)")
    parser.add_argument("--errors", choices=["strict", "replace"], default="strict", help="what to do on invalid UTF-8")
    parser.add_argument("--workers", type=int, help="processes (default: one per core); does not change the result")
    a = parser.parse_args(argv)
    if not 0 <= a.validation_share < 1:
        parser.error(f"--validation-share {a.validation_share} is not in [0, 1)")
    from kdtrain.data.prepare import PrepareSettings, prepare_corpus
    from kdtrain.log import setup_logging

    setup_logging()
    settings = PrepareSettings(a.field, a.errors, a.validation_share, a.separator, a.workers)
    for name, manifest in prepare_corpus(a.inputs, a.tokenizer, a.output, settings).items():
        print(f"{a.output}/{name}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
