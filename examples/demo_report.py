"""Compare runs of the demo.   python examples/demo_report.py DISTILL_RUN PRETRAIN_RUN [--prompt TEXT]"""

import argparse
import sys
from pathlib import Path

from kdtrain.config.cli import run_script


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("distill", type=Path, help="run folder of the distilled student")
    parser.add_argument("pretrain", type=Path, help="run folder of the student trained by cross-entropy alone")
    parser.add_argument("--prompt", default="The database file is", help="text for the distilled student to continue")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    request = parser.parse_args(argv)
    from compare_runs import compare_runs, table_text

    from kdtrain.models.generate import continue_text

    text = table_text(compare_runs(request.distill, request.pretrain))
    print(text)
    if request.markdown:
        head = (
            "# Distillation against plain cross-entropy, on two CPU ranks\n\n"
            "Written by `python examples/demo_report.py DISTILL_RUN PRETRAIN_RUN --markdown docs/results/demo.md`\n"
            "after `sh launch/quickstart.sh`. Teacher, text, sizes, held-out tokens: configs/demo. One seed.\n\n"
        )
        request.markdown.write_text(head + text, encoding="utf-8")
    print(f"\nthe distilled student continues: {continue_text(request.distill / 'export', request.prompt)!r}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
