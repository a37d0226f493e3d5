"""Turn a GGUF file into a Hugging Face folder.   python launch/import_gguf.py FILE.gguf OUT_FOLDER [--sha256 HEX]"""

import argparse
import sys
from pathlib import Path

from kdtrain.config.cli import run_script


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="the GGUF file")
    parser.add_argument("output", type=Path, help="folder to create or replace")
    parser.add_argument("--sha256", help="refuse a file with another hash")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="dtype of the weights")
    request = parser.parse_args(argv)
    import torch

    from kdtrain.models.import_gguf import import_gguf

    done = import_gguf(request.file, request.output, sha256=request.sha256, dtype=getattr(torch, request.dtype))
    stored = ", ".join(f"{kind} x {count}" for kind, count in sorted(done.stored_as.items()))
    print(f"{done.folder}: {done.num_parameters:,} parameters, {done.vocab_size:,} tokens, {request.dtype}")
    print(f"document separator: {done.document_separator}; weights were stored as {stored}: a rounded copy")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
