"""Turn text into token stores.   python launch/prepare_corpus.py --tokenizer DIR --output DIR INPUT [INPUT ...]

INPUT: text files (one document each), .jsonl and .ndjson files (one document per line), each also as .xz or .gz;
patterns; folders; with --from-megatron prefixes of Megatron .bin/.idx pairs. The result does not depend on the number
of workers. Input that becomes no document is counted by reason and reported at the end.
"""

import sys

from kdtrain.config.cli import run_script
from kdtrain.config.prepare_options import parse_prepare


def main(argv: list[str]) -> int:
    a = parse_prepare(__doc__, argv)

    from kdtrain.data.import_megatron import MegatronSettings, import_megatron
    from kdtrain.data.prepare import PrepareSettings, prepare_corpus
    from kdtrain.log import setup_logging

    setup_logging()
    if a.from_megatron:
        pairs = MegatronSettings(a.separator, a.bos, a.documents_from, a.inner_separators, bool(a.in_place))
        made = import_megatron(a.inputs, a.tokenizer, a.output, pairs)
    else:
        settings = PrepareSettings(
            field="text" if a.field is None else a.field,
            errors=a.errors or "strict",
            validation_share=a.validation_share,
            separator=a.separator,
            workers=a.workers,
            split_on=a.split_on,
            bos=a.bos,
            skip_invalid=bool(a.skip_invalid),
            inner_separators=a.inner_separators,
        )
        made = prepare_corpus(a.inputs, a.tokenizer, a.output, settings)
    for name, manifest in made.items():
        print(f"{a.output}/{name}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
