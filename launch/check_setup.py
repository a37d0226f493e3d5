"""Check versions, devices, kernels, collectives and disk.   [deepspeed] launch/check_setup.py [CONFIG.yaml] [key=value]

Prints one table; put it at the top of a bug report. Exit code 0 if every check passed, else 1; a warning is not
a failure. Only parallel.tp, parallel.cp, teacher.layout, run.output_dir, train.kernels, zero.offload_optimizer, and
attention and dtype of both models are read; without a CONFIG.yaml they have their defaults.
"""

import os
import sys
from pathlib import Path

from kdtrain.config.cli import run_script
from kdtrain.config.launcher import fill_launcher_environment, require_meeting_point
from kdtrain.config.load import drop_launcher_arguments, load_run

BASE = Path(__file__).resolve().parents[1] / "configs/base/pretrain.yaml"


def main(argv: list[str]) -> int:
    fill_launcher_environment(os.environ)
    words = drop_launcher_arguments(argv)
    if {"-h", "--help"} & set(words):
        print(__doc__.strip())
        return 0
    if not any(word.endswith((".yaml", ".yml")) for word in words):
        words.insert(0, str(BASE))
    # required settings that no check reads
    cfg = load_run([*words, "run.name=check_setup", "train.total_tokens=1"]).config
    require_meeting_point(os.environ)
    from kdtrain.jobs.check_setup.checks import run_checks  # torch, deepspeed: seconds

    return run_checks(cfg)


if __name__ == "__main__":
    code = run_script(main, sys.argv[1:])
    if "torch" in sys.modules:  # this process has been a rank
        from kdtrain.engine.bootstrap import exit_process

        exit_process(code)
    sys.exit(code)
