"""Every reason parallel.cp cannot run, with its fix; and what it changes in the other checks."""

import pytest

from kdtrain.config import validate
from kdtrain.config.schema import RunConfig


def found(world_size, **changes):
    """(key, everything said) of each problem of a configuration that runs on 8 ranks as tp 2 x cp 2, then changed."""
    cfg = RunConfig()
    cfg.run.name, cfg.student.architecture, cfg.teacher.weights, cfg.data.train = "a", "llama-5m", "t", ["a"]
    cfg.parallel.tp, cfg.parallel.cp, cfg.train.total_tokens = 2, 2, 960
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch, cfg.data.tokens_per_step = 8, 3, 96
    for name, value in changes.items():
        section, leaf = name.split("__")
        setattr(getattr(cfg, section), leaf, value)
    return [(p.key, f"{p.value} {p.why}; {p.fix}") for p in validate.problems(cfg, world_size=world_size)]


def test_a_layout_with_cp_has_no_problem():
    assert found(8) == []
    assert found(4, data__tokens_per_step=48) == []
    assert found(2, parallel__tp=1, data__tokens_per_step=24) == []
    assert found(8, teacher__layout="tp") == []
    assert found(8, teacher__layout="tp", teacher__tp=2) == []


@pytest.mark.parametrize(
    ("world_size", "changes", "key", "words"),
    [
        (8, {"parallel__cp": 0}, "parallel.cp", "0 is smaller than 1; 1 means that each rank holds whole sequences"),
        (
            8,
            {"parallel__cp": 3, "data__seq_len": 9},
            "parallel.cp",
            "3 times parallel.tp = 2 does not divide the number of ranks (8); use one of [1, 2, 4], or start a "
            "multiple of 6 ranks",
        ),
        (
            8,
            {"data__seq_len": 9, "data__tokens_per_step": 54},
            "data.seq_len",
            "9 is not a multiple of parallel.cp = 2, which share each sequence; use 8 or 10, or another parallel.cp",
        ),
        (
            8,
            {"teacher__layout": "tp", "teacher__tp": 4},
            "teacher.tp",
            "4 differs from parallel.tp = 2 while parallel.cp = 2: the ranks of such a teacher would hold parts of the "
            "same sequences, not batches of their own; set teacher.tp=null, or teacher.layout=plain with "
            "teacher.zero_stage=3, or parallel.cp=1",
        ),
        (
            8,
            {"data__tokens_per_step": 72},
            "data.tokens_per_step",
            "72 is not a multiple of 48 = seq_len 8 x sequences_per_micro_batch 3 x dp 2; use 48 or 96, or another "
            "data.sequences_per_micro_batch",
        ),
    ],
)
def test_what_cannot_run_is_said_once_and_with_its_fix(world_size, changes, key, words):
    assert found(world_size, **changes) == [(key, words)]


def test_a_short_sequence_is_not_mended_to_none():
    assert found(8, data__seq_len=3, parallel__cp=4, data__tokens_per_step=9) == [
        (
            "data.seq_len",
            "3 is not a multiple of parallel.cp = 4, which share each sequence; use 4, or another parallel.cp",
        )
    ]
