"""What the memory estimate says of weights and states that are not on the device."""

from dataclasses import replace

import pytest

from kdtrain.config.schema import RunConfig
from kdtrain.training.estimate import ModelSize, estimate_memory, estimate_teacher_rank

STUDENT, TEACHER = ModelSize(8_000_000, 256, 4, 1024), ModelSize(32_000_000, 512, 8, 1024)


def estimated(stage, *, offload, teacher=None, dp_size=2):
    cfg = RunConfig()
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch, cfg.data.tokens_per_step = 16, 1, 64
    cfg.parallel.tp, cfg.zero.stage, cfg.zero.offload_optimizer = 2, stage, offload
    if teacher is not None:
        cfg.teacher.zero_stage, cfg.teacher.offload = 3, offload
    return estimate_memory(cfg, STUDENT, teacher, dp_size=dp_size)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_on_the_host_leaves_the_device(stage):
    on, off = estimated(stage, offload=True), estimated(stage, offload=False)
    assert off.host == 0
    assert on.host == 8_000_000 // 2 // 2 * 20
    assert off.parts["optimizer"] == 8_000_000 // 2 // 2 * 12
    gone = off.parts["optimizer"] + (off.parts["gradients"] if stage == 3 else 0)
    assert off.total - on.total == gone
    assert on.line().endswith("; in host memory 0.04)")
    assert "host" not in off.line()


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (3, 2)])
def test_what_is_written_behind_training_is_copied_to_the_host(stage, ranks):
    cfg = RunConfig()
    cfg.zero.stage = stage
    assert estimate_memory(cfg, STUDENT, None, dp_size=2).host == 0
    cfg.checkpoint.async_write = True
    assert estimate_memory(cfg, STUDENT, None, dp_size=2).host == 8_000_000 * 12 // ranks


def test_a_teacher_that_runs_ahead_keeps_the_hidden_states_of_two_micro_batches():
    cfg = RunConfig()
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch = 16, 3
    one = estimate_memory(cfg, STUDENT, TEACHER, dp_size=1).parts["teacher_hidden"]
    cfg.teacher.overlap = True
    assert estimate_memory(cfg, STUDENT, TEACHER, dp_size=1).parts["teacher_hidden"] == 2 * one


def test_a_quantised_decoder_takes_a_byte_per_element_and_its_vocabulary_two():
    cfg = RunConfig()
    cfg.teacher.quantize = "int8"
    vocabulary = 2 * 1024 * 512
    assert estimate_memory(cfg, STUDENT, TEACHER, dp_size=1).parts["teacher"] == 32_000_000 + vocabulary


def test_experts_are_not_quantised():
    cfg = RunConfig()
    mixture = replace(TEACHER, num_expert_parameters=20_000_000)
    full = estimate_memory(cfg, STUDENT, mixture, dp_size=1).parts["teacher"]
    assert full == 2 * 32_000_000
    cfg.teacher.quantize = "int8"
    quantised = 32_000_000 - 20_000_000 - 2 * 1024 * 512
    assert estimate_memory(cfg, STUDENT, mixture, dp_size=1).parts["teacher"] == full - quantised


def test_a_teacher_on_the_host_is_counted_there():
    on, off = (estimated(2, offload=offload, teacher=TEACHER) for offload in (True, False))
    assert on.host - estimated(2, offload=True).host == 32_000_000 * 2 // 4
    assert off.parts["teacher"] - on.parts["teacher"] == 32_000_000 * 2 // 4


def test_answers_of_a_dedicated_teacher_are_counted_on_both_hosts():
    cfg = RunConfig()
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch = 16, 3
    here = estimate_memory(cfg, STUDENT, TEACHER, dp_size=2).host
    cfg.teacher.weights, cfg.teacher.layout, cfg.teacher.ranks, cfg.teacher.in_flight = "folder", "dedicated", 1, 5
    answers = 6 * 16 * 3 * TEACHER.width * 2
    assert estimate_memory(cfg, STUDENT, TEACHER, dp_size=2).host - here == answers
    assert estimate_teacher_rank(cfg, TEACHER, dp_size=2).host == 2 * answers


def test_ranks_that_share_sequences_share_activations_and_states():
    cfg = RunConfig()
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch, cfg.data.tokens_per_step = 16, 2, 128
    cfg.zero.stage, cfg.teacher.zero_stage = 3, 3
    whole = estimate_memory(cfg, STUDENT, TEACHER, dp_size=2).parts
    cfg.parallel.cp = 4
    shared = estimate_memory(cfg, STUDENT, TEACHER, dp_size=2).parts
    for name in ("activations", "weights", "gradients", "optimizer", "teacher_hidden"):
        assert shared[name] == whole[name] // 4, name
