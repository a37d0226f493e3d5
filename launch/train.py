"""Train a student.   deepspeed launch/train.py CONFIG.yaml [MORE.yaml ...] [key=value ...]"""

import sys

# no torch yet: mistakes are reported in a fraction of a second
from kdtrain.config.cli import Request, parse, run_script
from kdtrain.imports import collector_paused


def main(request: Request) -> int:
    with collector_paused():
        from kdtrain.jobs.train import run_training  # torch, deepspeed, transformers: seconds

    return run_training(request)


if __name__ == "__main__":
    code = run_script(lambda argv: main(parse(argv, __doc__)), sys.argv[1:])
    if "torch" in sys.modules:  # this process has been a rank
        from kdtrain.engine.bootstrap import exit_process

        exit_process(code)
    sys.exit(code)
