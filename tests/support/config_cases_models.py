"""Configurations with one mistake in sections run, student or teacher, by the module of the check."""

from __future__ import annotations

import math

from tests.support.config_cases import Case, dedicated

CASES: dict[str, dict[str, Case]] = {
    "texts": {
        "empty text": ({"run__output_dir": ""}, "run.output_dir", "is empty"),
        "empty item": ({"data__train": ["a", ""]}, "data.train", "is empty"),
        "control character": ({"log__wandb__entity": "a\nb"}, "log.wandb.entity", "holds a control character"),
        "home folder": ({"run__output_dir": "~/runs"}, "run.output_dir", "which only a shell expands"),
    },
    "run": {
        "slash in name": ({"run__name": "a/b"}, "run.name", "cannot name a folder"),
        "dots as name": ({"run__name": ".."}, "run.name", "cannot name a folder"),
        "option as name": ({"run__name": "-rf"}, "run.name", "cannot name a folder"),
        "accent in name": ({"run__name": "\xe9"}, "run.name", "cannot name a folder"),
        "long name": ({"run__name": "a" * 129}, "run.name", "at most 128"),
        "seed": ({"run__seed": -1}, "run.seed", "is negative"),
        "seed larger than torch's": ({"run__seed": 2**64}, "run.seed", "is larger than 18446744073709551615"),
        "time limit": ({"run__time_limit_s": 0.0}, "run.time_limit_s", "is not a positive number"),
        "time limit nan": ({"run__time_limit_s": math.nan}, "run.time_limit_s", "is not a positive number"),
        "resume and continue_from": (
            {"run__continue_from": "a", "run__resume": "b"},
            "run.continue_from",
            "while run.resume = b: a run begins at",
        ),
        "lock lease": ({"run__lock_lease_s": 0.0}, "run.lock_lease_s", "is not a positive number"),
    },
    "student": {
        "no student": ({"student__architecture": None}, "student.architecture", "there is no student"),
        "weights and architecture": (
            {"student__weights": "w"},
            "student.architecture",
            "would be ignored: student.weights = w",
        ),
    },
    "attention": {
        "student": (
            {"student__attention": "flash_attention_2", "student__dtype": "float32"},
            "student.attention",
            "cannot work on student.dtype = float32",
        ),
        "teacher": (
            {"teacher__attention": "flash_attention_3", "teacher__dtype": "float32"},
            "teacher.attention",
            "cannot work on teacher.dtype = float32",
        ),
    },
    "teacher": {
        "no teacher": ({"teacher__weights": None}, "teacher.weights", "objective.name = distill needs a teacher"),
        "zero stage 1": ({"teacher__zero_stage": 1}, "teacher.zero_stage", "is neither 0 nor 3"),
        "tokens per forward": (
            {"teacher__max_tokens_per_forward": 7},
            "teacher.max_tokens_per_forward",
            "is less than one sequence",
        ),
        "overlap with pretrain": (
            {"objective__name": "pretrain", "teacher__overlap": True},
            "teacher.overlap",
            "objective.name = pretrain",
        ),
        "quantised with ZeRO-3": (
            {"teacher__quantize": "int8", "teacher__zero_stage": 3},
            "teacher.quantize",
            "divides ordinary weights only",
        ),
        "quantised and dedicated": (
            {
                "teacher__layout": "dedicated",
                "teacher__ranks": 2,
                "teacher__quantize": "fp8",
                "data__tokens_per_step": 24,
            },
            "teacher.quantize",
            "measured where the head is",
        ),
        "overlap with ZeRO-3": (
            {"teacher__zero_stage": 3, "teacher__overlap": True},
            "teacher.overlap",
            "a whole step runs ahead",
        ),
        "offload without ZeRO-3": (
            {"teacher__offload": True},
            "teacher.offload",
            "would be ignored: teacher.zero_stage is not 3",
        ),
        "tp with layout plain": ({"teacher__tp": 4}, "teacher.tp", "would be ignored: teacher.layout = plain"),
        "tp no multiple": (
            {"teacher__tp": 3, "teacher__layout": "tp"},
            "teacher.tp",
            "is not a multiple of parallel.tp = 2",
        ),
        "tp 0": ({"teacher__tp": 0, "teacher__layout": "tp"}, "teacher.tp", "use 2, 4 or 8"),
        "tp 8": ({"teacher__tp": 8, "teacher__layout": "tp"}, "teacher.tp", "does not divide the number"),
        **{
            f"{name} without a teacher": (
                {"objective__name": "pretrain", "teacher__weights": None, f"teacher__{name}": value},
                f"teacher.{name}",
                "would be ignored: teacher.weights = null\n"
                f"      fix: set teacher.weights, or teacher.{name}={default}",
            )
            for name, value, default in (
                ("layout", "dedicated", "plain"),
                ("tp", 2, "null"),
                ("ranks", 2, "null"),
                ("zero_stage", 3, "0"),
                ("offload", True, "false"),
                ("quantize", "int8", "null"),
                ("overlap", True, "false"),
                ("max_tokens_per_forward", 64, "null"),
            )
        },
    },
    "dedicated_teacher": {
        "ranks with layout plain": ({"teacher__ranks": 2}, "teacher.ranks", "would be ignored: teacher.layout = plain"),
        "in_flight with layout plain": (
            {"teacher__in_flight": 2},
            "teacher.in_flight",
            "would be ignored: teacher.layout = plain",
        ),
        "no number of ranks": ({"teacher__layout": "dedicated"}, "teacher.ranks", "needs a number of ranks"),
        "ranks 0": (dedicated(0), "teacher.ranks", "is smaller than 1"),
        "no rank for the student": (
            {**dedicated(4), "parallel__tp": 1},
            "teacher.ranks",
            "leaves no rank for the student: the job has 4",
        ),
        "tp 3": (
            dedicated(2, tp=3),
            "teacher.tp",
            "does not divide teacher.ranks = 2\n      fix: use one of [1, 2]",
        ),
        "tp 0": (dedicated(2, tp=0), "teacher.tp", "does not divide teacher.ranks = 2"),
        "ZeRO-3": (dedicated(2, zero_stage=3), "teacher.zero_stage", "must all run at once"),
        "overlap": (dedicated(2, overlap=True), "teacher.overlap", "always runs ahead"),
        "in_flight 0": (dedicated(2, in_flight=0), "teacher.in_flight", "is not in [1, 1024]"),
        "with pretrain": (
            {**dedicated(2), "objective__name": "pretrain"},
            "teacher.layout",
            "uses the teacher only in evaluations",
        ),
    },
}
