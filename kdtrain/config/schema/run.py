"""Section run: identity and life of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class RunSection:
    """Identity and life of a run."""

    name: str = "???"
    """Names the run folder `<output_dir>/<name>` and the wandb run."""
    output_dir: str = "runs"
    """Folder that holds run folders."""
    seed: int = 1
    """Seeds initialisation and data order. The same seed gives the same run in any layout."""
    resume: str = "auto"
    """auto: continue from the newest good checkpoint of this run folder, if any. never: refuse a folder that holds
    checkpoints. Anything else: path of a checkpoint to continue from, on the same data in the same order."""
    continue_from: str | None = None
    """Begin a new stage, e.g. of annealing, with the student and the optimizer's state of this checkpoint, or of the
    newest one of this run folder: weights, AdamW's moments and step counts. Steps, tokens, learning-rate schedule and
    data position start at 0, so stores, weights, seq_len, schedule and teacher may differ; student and tokenizer may
    not. The same command repeated resumes the new run."""
    time_limit_s: float | None = None
    """Wall-clock seconds after which the run saves and exits with code 75. null: no limit."""
    lock_lease_s: float | None = 60.0
    """The run updates its LOCK several times in this time; a run on another host that sees no update for as long takes
    the folder over. null: a LOCK left by a killed run on another host has to be removed by hand."""
