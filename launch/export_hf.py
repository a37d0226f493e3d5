"""Turn a checkpoint into a Hugging Face folder.   python launch/export_hf.py RUN_OR_CHECKPOINT OUT

Rows of the vocabulary that the run's softmax does not have are left out; docs/export.md lists the files of the folder.
"""

import argparse
import sys
from pathlib import Path

from kdtrain.config.cli import run_script


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run folder (its newest checkpoint) or one checkpoint folder")
    parser.add_argument("output", type=Path, help="folder to create")
    help_ = "dtype of the weights (default: student.dtype of the run)"
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help=help_)
    request = parser.parse_args(argv)
    from kdtrain.jobs.export_hf import export_checkpoint

    print(export_checkpoint(request.source, request.output, dtype=request.dtype))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
