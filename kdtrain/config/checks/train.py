"""Checks of section train."""

from __future__ import annotations

from kdtrain.config.checks.report import Report
from kdtrain.config.schema import RunConfig

MIN_SLAB_BYTES, MAX_SLAB_BYTES = 1 << 20, 1 << 40


def has_a_step(cfg: RunConfig) -> bool:
    """Whether train.total_tokens is at least one step."""
    return cfg.train.total_tokens >= max(1, cfg.data.tokens_per_step)


def check_train(cfg: RunConfig, report: Report) -> None:
    """Length of the run, and the loss's memory."""
    if not has_a_step(cfg):
        why = f"is less than one step (data.tokens_per_step = {cfg.data.tokens_per_step})"
        report.add("train.total_tokens", why, "train for at least one step")
    if not MIN_SLAB_BYTES <= cfg.train.slab_bytes <= MAX_SLAB_BYTES:
        report.add("train.slab_bytes", f"is not in [{MIN_SLAB_BYTES}, {MAX_SLAB_BYTES}]", "1073741824 is usual")
