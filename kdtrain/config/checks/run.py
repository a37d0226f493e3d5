"""Checks of section run."""

from __future__ import annotations

from kdtrain.config.checks.report import Report
from kdtrain.config.schema import RunSection

MAX_NAME_LENGTH = 128
MAX_SEED = 2**64 - 1
NAME_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


def check_run(run: RunSection, report: Report) -> None:
    """Name, seed, limits of time and the checkpoint to start from."""
    if run.name and (run.name[0] in "._-" or not NAME_LETTERS.issuperset(run.name) or len(run.name) > MAX_NAME_LENGTH):
        fix = f"use at most {MAX_NAME_LENGTH} letters, digits, '.', '_' and '-', a letter or digit first"
        report.add("run.name", "cannot name a folder and a wandb run", fix)
    if run.seed < 0:
        report.add("run.seed", "is negative", "use 0 or more")
    if run.seed > MAX_SEED:
        report.add("run.seed", f"is larger than {MAX_SEED}, torch's largest seed", "use a smaller number")
    report.positive("run.time_limit_s", "seconds, or null for no limit")
    report.positive("run.lock_lease_s", "60 is usual, null: no lease")
    if run.continue_from is not None and run.resume not in ("auto", "never"):
        why = f"while run.resume = {run.resume}: a run begins at one checkpoint"
        fix = (
            "keep run.continue_from for a new stage (other data, steps from 0), or run.resume to go on with the same "
            "data where the checkpoint stopped; run.resume=auto resumes the new stage itself"
        )
        report.add("run.continue_from", why, fix)
