"""Section checkpoint: resumable states."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class CheckpointSection:
    """Resumable states."""

    every_steps: int | None = None
    """Steps between checkpoints. null: only at the end and when stopped."""
    keep_last: int = 2
    """How many of the newest checkpoints are kept."""
    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this are also kept for good; a multiple of every_steps. null: none."""
    async_write: bool = False
    """Copy to host memory (12 bytes per parameter that a rank owns, pinned on CUDA, kept for the whole run) and write
    while training goes on. The next save, a stop and the end of the run wait until it is on disk."""
    export: bool = True
    """Write the finished student as a Hugging Face folder `<run>/export`, without rows of the vocabulary that the run's
    softmax does not have; see docs/export.md."""
