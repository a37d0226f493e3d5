"""Checks of section data: stores, sizes of a step and the sequence prefix."""

from __future__ import annotations

import math

from kdtrain.config.checks.report import Report
from kdtrain.config.objectives import traits_of
from kdtrain.config.ranks import data_ranks
from kdtrain.config.schema import RunConfig

MAX_PREFETCH = 1024


def check_data(cfg: RunConfig, report: Report) -> None:
    """Stores and their shares, minimum sizes, and sequence_prefix as far as it can be checked without a tokenizer."""
    d = cfg.data
    if not d.train and traits_of(cfg.objective).batches == "tokens":
        report.add("data.train", "names no token store", "make one with launch/prepare_corpus.py")
    if d.train_weights is not None and len(d.train_weights) != len(d.train):
        why = f"gives {len(d.train_weights)} weights for the {len(d.train)} stores of data.train"
        report.add("data.train_weights", why, "list as many weights as stores, or null: in proportion to their tokens")
    if d.train_weights is not None and not all(0 < weight < math.inf for weight in d.train_weights):
        report.add("data.train_weights", "are not all positive numbers", "leave a store out to not use it")
    for name, least in (("seq_len", 2), ("tokens_per_step", 1), ("sequences_per_micro_batch", 1), ("prefetch", 0)):
        report.at_least(f"data.{name}", least)
    if d.prefetch > MAX_PREFETCH:
        report.add("data.prefetch", f"is larger than {MAX_PREFETCH} steps", "2 is plenty")
    if d.allow_worse_prefix and d.sequence_prefix == "auto":
        fix = "name a token or none as data.sequence_prefix, or remove it"
        report.ignored("data.allow_worse_prefix", "data.sequence_prefix = auto takes the better one", fix)


def check_tokens_per_step(cfg: RunConfig, num_students: int, report: Report) -> None:
    """Whether a step is a whole number of micro-batches on each data rank. num_students: ranks with the student.

    Skipped when sizes or the layout are wrong, which other checks report.
    """
    d, dp = cfg.data, data_ranks(cfg, num_students)
    if dp is None or min(d.seq_len, d.sequences_per_micro_batch, d.tokens_per_step) < 1:
        return
    unit = d.seq_len * d.sequences_per_micro_batch * dp
    if d.tokens_per_step % unit:
        below = d.tokens_per_step // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        factors = f"seq_len {d.seq_len} x sequences_per_micro_batch {d.sequences_per_micro_batch} x dp {dp}"
        fix = f"use {near}, or another data.sequences_per_micro_batch"
        report.add("data.tokens_per_step", f"is not a multiple of {unit} = {factors}", fix)
