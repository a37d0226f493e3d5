"""What every script shares: from arguments to a checked configuration, --help, --print-config, --check, exit codes.

No torch here: a mistake is reported in a fraction of a second.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdtrain.config.checks import check
from kdtrain.config.launcher import fill_launcher_environment, require_meeting_point, world_size
from kdtrain.config.load import Loaded, drop_launcher_arguments, load_run, yaml_lines
from kdtrain.config.problems import DEFAULT
from kdtrain.config.schema import RunConfig
from kdtrain.errors import EXIT_CONFIG, EXIT_DONE, ConfigError, KdtrainError
from kdtrain.log import rank_from_environment

EXIT_INTERRUPTED = 130
UNUSABLE_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
"""Errors whose only possible cause is the path itself."""
HELP, PRINT_CONFIG, CHECK = ("--help", "-h"), "--print-config", "--check"


@dataclass(frozen=True, slots=True)
class Request:
    """A parsed command line. check_only: print what would run, then stop. world_size: ranks of the job."""

    loaded: Loaded
    check_only: bool = False
    world_size: int = 1

    @property
    def config(self) -> RunConfig:
        """The checked configuration."""
        return self.loaded.config


def parse(argv: Sequence[str], doc: str | None) -> Request:
    """Configuration of the arguments `argv`, checked for as many ranks as the launcher announced. `doc` heads --help.

    `--help [section]` and `--print-config` print on rank 0 and raise SystemExit(0); printing shows a configuration
    that loads, whether or not it could run. Raises ConfigError with every problem.
    """
    fill_launcher_environment(os.environ)
    words = drop_launcher_arguments(argv)
    if any(word in HELP for word in words):
        _print_help(words, doc or "")
        raise SystemExit(EXIT_DONE)
    flags = {word for word in words if word in (CHECK, PRINT_CONFIG)}
    loaded = load_run([word for word in words if word not in flags])
    if PRINT_CONFIG in flags:
        _print_once(print_config(loaded))
        if CHECK not in flags:
            raise SystemExit(EXIT_DONE)
    ranks = world_size(os.environ)
    expected = loaded.config.parallel.world_size
    if CHECK in flags and "WORLD_SIZE" not in os.environ and expected is not None and expected >= 1:
        ranks = expected
    check(loaded, world_size=ranks)
    if CHECK not in flags:  # WORLD_SIZE=8 python launch/train.py ... --check checks a layout without its ranks
        require_meeting_point(os.environ)
    return Request(loaded, check_only=CHECK in flags, world_size=ranks)


def _print_help(words: Sequence[str], doc: str) -> None:
    from kdtrain.config.explain import help_text

    sections = [word for word in words if not word.startswith("-") and "=" not in word and ".yaml" not in word]
    _print_once(help_text(doc, sections[0] if sections else None))


def print_config(loaded: Loaded) -> str:
    """The resolved configuration as YAML, with a comment for each setting that is not a default: where it was set."""
    lines = list(yaml_lines(loaded.config))
    width = min(60, max(len(line) for _, line in lines))
    shown = []
    for key, line in lines:
        origin = loaded.origins.get(key, DEFAULT)
        shown.append(line if origin == DEFAULT else f"{line:<{width}}  # {origin}")
    return "\n".join(shown)


def run_script(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Call main(argv) and return the process's exit code (kdtrain.errors).

    A KdtrainError becomes its exit code and its message, without a traceback (see `_report`). So does a path of the
    command line that no file system takes. Ctrl-C is 130. Anything unforeseen passes through: Python prints its
    traceback and exits with 1.
    """
    try:
        return main(argv)
    except KdtrainError as error:
        _report(error)
        return error.exit_code
    except OSError as error:
        if error.errno not in UNUSABLE_PATH:
            raise
        shown = f"{error.filename}: {error.strerror}"
        _report(ConfigError(f"{shown}\n  why: no file can have this path\n  fix: check the path that was given"))
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _report(error: KdtrainError) -> None:
    """Print an error once per job, and one line for it on other ranks that may be the only ones with the error.

    Rank 0 prints the whole message. All ranks of a node find the same configuration errors, so elsewhere the first rank
    of each node prints them (a path may be missing on one node only). Any other error may have occurred on one rank
    only: every other rank prints its first line.
    """
    sys.stdout.flush()
    rank = rank_from_environment()
    if rank == 0:
        print(f"kdtrain: {error}", file=sys.stderr, flush=True)
        return
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    where = f"kdtrain: rank {rank} on {os.uname().nodename}"
    if not isinstance(error, ConfigError):
        print(f"{where}: {str(error).partition(chr(10))[0]}", file=sys.stderr, flush=True)
    elif local_rank == "0":
        print(f"{where}: {error}", file=sys.stderr, flush=True)


def _print_once(text: str) -> None:
    """To stdout on rank 0. A reader that closes the pipe early (`| head`) is not an error."""
    if rank_from_environment() != 0:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more at exit: redirect it, so that this flush succeeds
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
