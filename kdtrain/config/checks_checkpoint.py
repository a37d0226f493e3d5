"""Reasons why the section checkpoint cannot be kept. Called by `validate.problems`."""

from __future__ import annotations

from collections.abc import Iterator

from kdtrain.config.problems import Problem
from kdtrain.config.schema import CheckpointSection


def checkpoint_problems(c: CheckpointSection) -> Iterator[Problem]:
    """Of checkpoint.keep_every, and of writing behind a run that saves at its end only."""
    key, every = "checkpoint.keep_every", c.every_steps
    if c.keep_every is not None and c.keep_every < 1:
        yield Problem(key, c.keep_every, "is smaller than 1", "use 1 or more, or null: none stays for ever")
    elif c.keep_every is not None and every is None:
        yield Problem(
            key, c.keep_every, "would be ignored: checkpoint.every_steps = null", "set checkpoint.every_steps too"
        )
    elif c.keep_every is not None and every is not None and every >= 1 and c.keep_every % every:
        near = max(1, round(c.keep_every / every)) * every
        yield Problem(key, c.keep_every, f"is no multiple of checkpoint.every_steps = {every}", f"use {near}")
    if c.async_write and every is None:
        yield Problem(
            "checkpoint.async_write",
            True,
            "would change nothing: checkpoint.every_steps = null, and the last save is waited for",
            "set checkpoint.every_steps too",
        )
