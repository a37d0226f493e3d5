"""Checks of section log."""

from __future__ import annotations

from kdtrain.config.checks.report import Report
from kdtrain.config.schema import LogSection

MAX_PROJECT_LENGTH = 128
NOT_IN_A_PROJECT = frozenset("/\\#?%:")


def check_log(log: LogSection, report: Report) -> None:
    """How often reports are written, and the names that wandb gets."""
    report.at_least("log.every_steps", 1)
    project, entity = log.wandb.project, log.wandb.entity
    if NOT_IN_A_PROJECT & set(project) or len(project) > MAX_PROJECT_LENGTH:
        fix = f"at most {MAX_PROJECT_LENGTH} characters, none of / \\ # ? % :"
        report.add("log.wandb.project", "is not a name that wandb accepts", fix)
    if entity is not None and "/" in entity:
        report.add("log.wandb.entity", "is not a single name", "entity and project are two settings")
