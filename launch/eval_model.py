"""Evaluate student.weights on data.validation.   deepspeed launch/eval_model.py CONFIG.yaml student.weights=FOLDER

With the CONFIG.yaml of a run from scratch, student.architecture=null too. The last line is JSON.
"""

import sys

from kdtrain.config.cli import Request, parse, run_script
from kdtrain.imports import collector_paused


def main(request: Request) -> int:
    with collector_paused():
        from kdtrain.jobs.eval_model import run_evaluation  # torch, transformers: seconds

    return run_evaluation(request)


if __name__ == "__main__":
    code = run_script(lambda argv: main(parse(argv, __doc__)), sys.argv[1:])
    if "torch" in sys.modules:  # this process has been a rank
        from kdtrain.engine.bootstrap import exit_process

        exit_process(code)
    sys.exit(code)
