"""Configurations with one mistake in sections data, parallel or zero, by the module of the check."""

from __future__ import annotations

import math

from tests.support.config_cases import Case, dedicated

CASES: dict[str, dict[str, Case]] = {
    "data": {
        "no data": ({"data__train": []}, "data.train", "names no token store"),
        "number of weights": ({"data__train_weights": [1.0]}, "data.train_weights", "gives 1 weights for the 2 stores"),
        "zero weight": ({"data__train_weights": [1.0, 0.0]}, "data.train_weights", "are not all positive"),
        "infinite weight": ({"data__train_weights": [1.0, math.inf]}, "data.train_weights", "are not all positive"),
        "nan weight": ({"data__train_weights": [1.0, math.nan]}, "data.train_weights", "are not all positive"),
        "seq_len": ({"data__seq_len": 1}, "data.seq_len", "is smaller than 2"),
        "micro-batch of 0": (
            {"data__sequences_per_micro_batch": 0},
            "data.sequences_per_micro_batch",
            "is smaller than 1",
        ),
        "tokens_per_step": ({"data__tokens_per_step": 0}, "data.tokens_per_step", "is smaller than 1"),
        "prefetch": ({"data__prefetch": -1}, "data.prefetch", "is smaller than 0"),
        "prefetch too large": ({"data__prefetch": 10**12}, "data.prefetch", "is larger than 1024 steps"),
        "allow_worse_prefix with auto": (
            {"data__allow_worse_prefix": True},
            "data.allow_worse_prefix",
            "sequence_prefix = auto takes",
        ),
        "tokens not a multiple": ({"data__tokens_per_step": 100}, "data.tokens_per_step", "use 96 or 144"),
        "tokens fewer than a micro-batch": (
            {"data__tokens_per_step": 40},
            "data.tokens_per_step",
            "multiple of 48 = seq_len 8 x sequences_per_micro_batch 3 x dp 2\n      fix: use 48, or",
        ),
        "tokens not a multiple with cp": (
            {"parallel__tp": 1, "parallel__cp": 2, "data__tokens_per_step": 72},
            "data.tokens_per_step",
            "multiple of 48 = seq_len 8 x sequences_per_micro_batch 3 x dp 2\n      fix: use 48 or 96, or",
        ),
    },
    "parallel": {
        "tp 0": ({"parallel__tp": 0}, "parallel.tp", "is smaller than 1"),
        "sequence at tp 1": ({"parallel__tp": 1, "parallel__sequence": True}, "parallel.sequence", "parallel.tp = 1,"),
        "sequence length not divided by tp": (
            {"parallel__sequence": True, "data__seq_len": 3, "data__tokens_per_step": 90},
            "parallel.sequence",
            "data.seq_len = 3",
        ),
        "tp 3": ({"parallel__tp": 3}, "parallel.tp", r"does not divide the number of ranks (4)"),
        "tp 8": ({"parallel__tp": 8}, "parallel.tp", r"use one of [1, 2, 4]"),
        "tp with a dedicated teacher": (
            dedicated(1),
            "parallel.tp",
            "does not divide the number of the student's ranks (3)\n      fix: use one of",
        ),
        "another number of ranks": (
            {"parallel__world_size": 16},
            "parallel.world_size",
            "expected, and 4 were started",
        ),
        "world_size 0": ({"parallel__world_size": 0}, "parallel.world_size", "is smaller than 1"),
    },
    "context_parallel": {
        "cp 0": ({"parallel__cp": 0}, "parallel.cp", "is smaller than 1"),
        "cp times tp not a divisor": (
            {"parallel__cp": 4},
            "parallel.cp",
            "times parallel.tp = 2 does not divide the number of ranks (4)\n      fix: use one of [1, 2], or start a "
            "multiple of 8 ranks",
        ),
        "sequence length not divided by cp": (
            {"parallel__cp": 2, "data__seq_len": 3, "data__tokens_per_step": 90},
            "data.seq_len",
            "is not a multiple of parallel.cp = 2, which share each sequence\n      fix: use 2 or 4, or another",
        ),
        "sequence shorter than cp": (
            {"parallel__tp": 1, "parallel__cp": 4, "data__seq_len": 3, "data__tokens_per_step": 90},
            "data.seq_len",
            "fix: use 4, or another parallel.cp",
        ),
        "teacher with more tp": (
            {"parallel__cp": 2, "teacher__layout": "tp", "teacher__tp": 4},
            "teacher.tp",
            "differs from parallel.tp = 2 while parallel.cp = 2",
        ),
        "dedicated teacher": (
            {**dedicated(2), "parallel__tp": 1, "parallel__cp": 2},
            "teacher.layout",
            "computes whole sequences",
        ),
    },
    "zero": {
        "optimizer offload at stage 0": (
            {"zero__stage": 0, "student__dtype": "float32", "zero__offload_optimizer": True},
            "zero.offload_optimizer",
            "would be ignored: zero.stage = 0",
        ),
        "stage 0 in bf16": ({"zero__stage": 0}, "zero.stage", "keep no float32 master weights"),
        "owned key": ({"zero__extra": {"stage": 1}}, "zero.extra.stage", "may not be set: it is zero.stage"),
        "misspelt key": (
            {"zero__extra": {"reduce_bucketsize": 1}},
            "zero.extra.reduce_bucketsize",
            "did you mean reduce_bucket_size?",
        ),
        "key like no other": ({"zero__extra": {"xyz": 1}}, "zero.extra.xyz", "known: reduce_bucket_size, "),
        "switch": ({"zero__extra": {"reduce_scatter": 1}}, "zero.extra.reduce_scatter", "neither true nor false"),
        "count": (
            {"zero__extra": {"sub_group_size": 0.5}},
            "zero.extra.sub_group_size",
            "is not a whole number of elements",
        ),
        "bucket of 0": (
            {"zero__extra": {"reduce_bucket_size": 0}},
            "zero.extra.reduce_bucket_size",
            "number of elements above 0",
        ),
        "count bool": ({"zero__extra": {"sub_group_size": True}}, "zero.extra.sub_group_size", "whole number"),
        "count nan": ({"zero__extra": {"sub_group_size": math.nan}}, "zero.extra.sub_group_size", "whole number"),
    },
}
