"""Checks of section checkpoint."""

from __future__ import annotations

from kdtrain.config.checks.report import Report
from kdtrain.config.schema import CheckpointSection


def check_checkpoint(c: CheckpointSection, report: Report) -> None:
    """How often checkpoints are written, which ones are kept, and whether async_write has an effect."""
    key, every = "checkpoint.keep_every", c.every_steps
    report.at_least("checkpoint.every_steps", 1)
    report.at_least("checkpoint.keep_last", 1)
    if c.keep_every is not None and c.keep_every < 1:
        report.at_least(key, 1, "use 1 or more, or null: none stays for ever")
    elif c.keep_every is not None and every is None:
        report.ignored(key, "checkpoint.every_steps = null", "set checkpoint.every_steps too")
    elif c.keep_every is not None and every is not None and every >= 1 and c.keep_every % every:
        near = max(1, round(c.keep_every / every)) * every
        report.add(key, f"is not a multiple of checkpoint.every_steps = {every}", f"use {near}")
    if c.async_write and every is None:
        why = "would change nothing: checkpoint.every_steps = null, and a run always waits for its last save"
        report.add("checkpoint.async_write", why, "set checkpoint.every_steps too")
