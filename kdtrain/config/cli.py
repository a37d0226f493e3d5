"""What every script shares: words to a checked configuration, --help, --print-config, --check, exit codes.

No torch here: a mistake is reported in a fraction of a second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

from kdtrain.config.load import Loaded, drop_launcher_arguments, load_run, to_yaml
from kdtrain.config.schema import RunConfig
from kdtrain.config.validate import check
from kdtrain.errors import KdtrainError
from kdtrain.log import rank_from_environment


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for. check_only: say what would run, then stop."""

    loaded: Loaded
    check_only: bool = False

    @property
    def config(self) -> RunConfig:
        """The checked configuration."""
        return self.loaded.config


SLURM_VARIABLES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


def fill_launcher_environment(environ: MutableMapping[str, str]) -> None:
    """Under srun without another launcher, derive RANK, LOCAL_RANK and WORLD_SIZE from SLURM's variables.

    Only inside a job step of several tasks. MASTER_ADDR and MASTER_PORT must be exported by the job script
    (docs/operations.md); ConfigError otherwise is torch's to raise.
    """
    if "RANK" in environ or "SLURM_STEP_ID" not in environ or int(environ.get("SLURM_NTASKS", "1")) < 2:
        return
    for name, source in SLURM_VARIABLES.items():
        if source in environ:
            environ.setdefault(name, environ[source])


def parse(argv: Sequence[str], doc: str | None) -> Request:
    """Configuration of the words `argv`, checked. `doc` heads --help.

    `--help [section]` and `--print-config` print and raise SystemExit(0). Raises ConfigError with every problem.
    """
    fill_launcher_environment(os.environ)
    words = drop_launcher_arguments(argv)
    if "--help" in words or "-h" in words:
        from kdtrain.config.explain import help_text

        sections = [word for word in words if not word.startswith("-") and "=" not in word and ".yaml" not in word]
        _print_once(help_text(doc or "", sections[0] if sections else None))
        raise SystemExit(0)
    flags = {word for word in words if word in ("--check", "--print-config")}
    loaded = load_run([word for word in words if word not in flags])
    if "--print-config" in flags:
        _print_once(print_config(loaded))
        raise SystemExit(0)
    check(loaded, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    return Request(loaded, check_only="--check" in flags)


def print_config(loaded: Loaded) -> str:
    """The resolved configuration as YAML, each key that was set followed by where."""
    lines, path = [], []
    for line in to_yaml(loaded.config).splitlines():
        stripped = line.lstrip()
        name, colon, _ = stripped.partition(":")
        if colon and not stripped.startswith("-"):
            depth = (len(line) - len(stripped)) // 2
            path = [*path[:depth], name]
            origin = loaded.origins.get(".".join(path))
            line = f"{line}  # {origin}" if origin else line
        lines.append(line)
    return "\n".join(lines)


def run_script(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Call main(argv) and return the process's exit code (kdtrain.errors).

    A KdtrainError is printed by rank 0, without a traceback; anything unforeseen passes through, with its
    traceback.
    """
    try:
        return main(argv)
    except KdtrainError as error:
        if rank_from_environment() == 0:
            print(f"kdtrain: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _print_once(text: str) -> None:
    if rank_from_environment() == 0:
        print(text, flush=True)
