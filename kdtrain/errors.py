"""Errors for users, with the exit codes that the scripts return for them.

A message names what is wrong and where (file, key, rank), why it matters, and how to fix it.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_OTHER = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_NON_FINITE = 4
EXIT_STOPPED = 75


class KdtrainError(Exception):
    """Base of all errors raised for users; `exit_code` is that of the script."""

    exit_code = EXIT_OTHER


class ConfigError(KdtrainError):
    """The configuration, a path it names, or the environment cannot work."""

    exit_code = EXIT_CONFIG


class ParallelError(ConfigError):
    """A model cannot be sharded over the mesh."""


class DataError(KdtrainError):
    """A corpus or store is missing, damaged, truncated or empty."""

    exit_code = EXIT_DATA


class StoreMismatch(DataError):
    """Two artefacts do not fit together; the message names both values."""


class CheckpointError(DataError):
    """A checkpoint is incomplete, damaged, or of another model."""


class NonFiniteLoss(KdtrainError):
    """The loss or a gradient became inf or nan."""

    exit_code = EXIT_NON_FINITE


class OutputError(KdtrainError):
    """A file of the run cannot be written: the disk is full, or the folder has become read-only."""

    @classmethod
    def of(cls, path: object, error: OSError) -> OutputError:
        """The OutputError for `error`, raised while writing `path`."""
        return cls(
            f"cannot write {path}: [Errno {error.errno}] {error.strerror}\n"
            "  why: the run's reports go there\n"
            "  fix: make room, check permissions, and repeat the command: it resumes from its last checkpoint"
        )


class PeerLost(KdtrainError):
    """A rank of the other role (student or dedicated teacher) has ended or does not respond.

    exit_code: that rank's, if it is known.
    """

    def __init__(self, message: str, exit_code: int = EXIT_OTHER) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RunStopped(KdtrainError):
    """A signal or the time limit ended the run after its state was saved."""

    exit_code = EXIT_STOPPED
