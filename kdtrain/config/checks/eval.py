"""Checks of section eval."""

from __future__ import annotations

from kdtrain.config.checks.report import Report
from kdtrain.config.schema import RunConfig


def check_eval(cfg: RunConfig, report: Report) -> None:
    """How often and on how much is evaluated, and whether there is a store for it."""
    report.at_least("eval.every_steps", 1)
    report.at_least("eval.max_tokens", 1)
    if cfg.data.validation is None and (cfg.eval.every_steps is not None or cfg.eval.max_tokens is not None):
        fix = "name a token store, or remove the section eval"
        report.add("data.validation", "but the section eval is set", fix)
