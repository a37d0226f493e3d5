"""The memory estimate: weights, states, buckets and masks, on the device and on the host."""

from dataclasses import replace

import pytest

from kdtrain.config.schema import RunConfig, ZeroSection
from kdtrain.jobs.header import memory_inputs
from kdtrain.planning.estimate import ModelSize, estimate_memory, estimate_teacher_rank, mask_bytes
from kdtrain.planning.zero_memory import Share, zero_memory

STUDENT, TEACHER = ModelSize(8_000_000, 256, 4, 1024), ModelSize(32_000_000, 512, 8, 1024)


def estimate(cfg, student=STUDENT, teacher=None, *, dp_size=1, on_cuda=True, attention="sdpa"):
    return estimate_memory(
        memory_inputs(cfg),
        student,
        teacher,
        dp_size=dp_size,
        on_cuda=on_cuda,
        student_attention=attention,
        teacher_attention=attention,
    )


def estimated(stage, *, offload, teacher=None, dp_size=2):
    cfg = RunConfig()
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch, cfg.data.tokens_per_step = 16, 1, 64
    cfg.parallel.tp, cfg.zero.stage, cfg.zero.offload_optimizer = 2, stage, offload
    if teacher is not None:
        cfg.teacher.zero_stage, cfg.teacher.offload = 3, offload
    return estimate(cfg, STUDENT, teacher, dp_size=dp_size)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_offload_removes_its_bytes_from_the_device(stage):
    on, off = estimated(stage, offload=True), estimated(stage, offload=False)
    assert off.host == 0
    assert on.host == 8_000_000 // 2 // 2 * 20
    assert off.parts["optimizer"] == 8_000_000 // 2 // 2 * 12
    assert on.parts["optimizer"] == on.parts["step"] == 0
    assert (on.parts["gradients"] == 0) == (stage == 3)
    assert off.total - on.total >= off.parts["optimizer"] - 2 * 1024 * 256 // 2  # a gradient on its way to the host
    assert on.line().endswith("; in host memory 0.04)")
    assert "host" not in off.line()


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (3, 2)])
def test_async_write_counts_a_copy_of_the_states_on_the_host(stage, ranks):
    cfg = RunConfig()
    cfg.zero.stage = stage
    assert estimate(cfg, STUDENT, None, dp_size=2).host == 0
    cfg.checkpoint.async_write = True
    assert estimate(cfg, STUDENT, None, dp_size=2).host == 8_000_000 * 12 // ranks


def test_overlapped_teacher_keeps_hidden_states_of_two_micro_batches():
    cfg = RunConfig()
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch = 16, 3
    one = estimate(cfg, STUDENT, TEACHER, dp_size=1).parts["teacher_hidden"]
    cfg.teacher.overlap = True
    assert estimate(cfg, STUDENT, TEACHER, dp_size=1).parts["teacher_hidden"] == 2 * one


def test_quantised_decoder_takes_one_byte_per_element_and_its_vocabulary_two():
    cfg = RunConfig()
    cfg.teacher.quantize = "int8"
    vocabulary = 2 * 1024 * 512
    assert estimate(cfg, STUDENT, TEACHER, dp_size=1).parts["teacher"] == 32_000_000 + vocabulary


def test_experts_are_counted_unquantised():
    cfg = RunConfig()
    mixture = replace(TEACHER, num_expert_parameters=20_000_000)
    full = estimate(cfg, STUDENT, mixture, dp_size=1).parts["teacher"]
    assert full == 2 * 32_000_000
    cfg.teacher.quantize = "int8"
    quantised = 32_000_000 - 20_000_000 - 2 * 1024 * 512
    assert estimate(cfg, STUDENT, mixture, dp_size=1).parts["teacher"] == full - quantised


def test_offloaded_teacher_is_counted_on_the_host():
    on, off = (estimated(2, offload=offload, teacher=TEACHER) for offload in (True, False))
    assert on.host - estimated(2, offload=True).host == 32_000_000 * 2 // 4
    assert off.parts["teacher"] - on.parts["teacher"] == 32_000_000 * 2 // 4


def test_hidden_states_in_flight_are_counted_on_both_hosts():
    cfg = RunConfig()
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch = 16, 3
    here = estimate(cfg, STUDENT, TEACHER, dp_size=2).host
    cfg.teacher.weights, cfg.teacher.layout, cfg.teacher.ranks, cfg.teacher.in_flight = "folder", "dedicated", 1, 5
    answers = 6 * 16 * 3 * TEACHER.width * 2
    assert estimate(cfg, STUDENT, TEACHER, dp_size=2).host - here == answers
    assert estimate_teacher_rank(memory_inputs(cfg), TEACHER, dp_size=2, attention="sdpa").host == 2 * answers


def test_context_parallelism_divides_activations_and_states():
    cfg = RunConfig()
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch, cfg.data.tokens_per_step = 16, 2, 128
    cfg.zero.stage, cfg.teacher.zero_stage = 3, 3
    whole = estimate(cfg, STUDENT, TEACHER, dp_size=2).parts
    cfg.parallel.cp = 4
    shared = estimate(cfg, STUDENT, TEACHER, dp_size=2).parts
    for name in ("activations", "weights", "gradients", "optimizer", "teacher_hidden"):
        assert shared[name] == whole[name] // 4, name


def zero_of(stage, *, parameters=1000.0, dtype="float32", on_cuda=False, extra=None, offload=False, micro_batches=2):
    zero = ZeroSection(stage=stage, extra=extra or {}, offload_optimizer=offload)
    share = Share(parameters, parameters / 10, 4, dtype == "bfloat16", micro_batches)
    return zero_memory(zero, share, on_cuda=on_cuda)


@pytest.mark.parametrize(
    ("stage", "dtype", "on_cuda", "bucket", "reducing"),
    [
        (1, "bfloat16", True, 0, 4),
        (1, "float32", True, 4, 4),
        (2, "bfloat16", False, 2, 6),
        (2, "bfloat16", True, 4, 6),
        (2, "float32", True, 8, 4),
        (3, "bfloat16", True, 4, 4),
        (3, "float32", False, 4, 8),
    ],
)
def test_bucket_sizes_by_stage_dtype_and_device(stage, dtype, on_cuda, bucket, reducing):
    found = zero_of(stage, dtype=dtype, on_cuda=on_cuda)
    assert (found.bucket, found.reducing) == (bucket * 1000, reducing * 1000)
    assert not found.early


@pytest.mark.parametrize("stage", [2, 3])
def test_bucket_of_zero_extra_is_counted_and_a_small_one_is_reduced_during_backward(stage):
    assert zero_of(stage, extra={"reduce_bucket_size": 5e8}).bucket == 4 * 500_000_000
    small = zero_of(stage, extra={"reduce_bucket_size": 50}, on_cuda=True)
    assert small.bucket == (4 if stage == 3 else 8) * 50
    assert small.early
    assert small.reducing == 4 * 100, "the largest gradient fits no bucket and is reduced alone"
    assert zero_of(stage, parameters=2e9).early


def test_stage_3_gathers_live_and_prefetched_weights():
    assert zero_of(3).gathered == 2 * 1000 * 4
    limits = {"stage3_max_live_parameters": 100, "stage3_prefetch_bucket_size": 10}
    assert zero_of(3, extra=limits).gathered == 110 * 4
    assert zero_of(2).gathered == 0


def test_total_is_the_largest_amount_at_one_time():
    cfg = RunConfig()
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch, cfg.data.tokens_per_step = 16, 1, 64
    cfg.zero.stage = 2
    cfg.train.slab_bytes = 1 << 20
    found = estimate(cfg, dp_size=2, on_cuda=False)
    kept = sum(found.parts[name] for name in ("weights", "gradients", "optimizer"))
    assert found.total == kept + found.parts["buckets"], "with few tokens gradients being reduced are most"
    cfg.data.sequences_per_micro_batch, cfg.data.tokens_per_step = 4096, 4096 * 16
    found = estimate(cfg, dp_size=2, on_cuda=False)
    kept += sum(found.parts[name] for name in ("activations", "masks", "loss"))
    assert found.total == kept + 2 * 8_000_000, "with many tokens backward is, beside the bucket alone"
    cfg.zero.extra = {"reduce_bucket_size": 1_000_000}
    small = estimate(cfg, dp_size=2, on_cuda=False)
    assert small.total == kept + small.parts["buckets"] == kept + (2 + 6) * 1_000_000


def test_only_masks_of_eager_and_sdpa_grow_with_seq_len_squared():
    sizes = {"sequences": 3, "seq_len": 64, "item": 2, "layers": 5}
    square = 3 * 64 * 64
    assert mask_bytes("sdpa", **sizes) == square * (1 + 2 * 5)
    assert mask_bytes("sdpa", **sizes, packed=False) == 0
    assert mask_bytes("sdpa_one_mask", **sizes) == square * (1 + 2)
    assert mask_bytes("eager", **sizes, heads=7) == square * 3 + square * 7 * 5 * 6
    for name in ("packed", "flash_attention_2", "flash_attention_3"):
        assert mask_bytes(name, **sizes, heads=7) == 4 * (3 * 64 + 1)


def test_student_keeps_masks_of_every_layer_and_teacher_of_one():
    cfg = RunConfig()
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch, cfg.parallel.cp = 64, 2, 2
    parts = estimate(cfg, STUDENT, TEACHER).parts
    assert parts["masks"] == 2 * 64 * 64 * (1 + 2 * 4)
    assert parts["teacher_masks"] == 2 * 64 * 64 * (1 + 2)
    cfg.student.activation_checkpointing, cfg.teacher.max_tokens_per_forward = True, 64
    parts = estimate(cfg, STUDENT, TEACHER).parts
    assert parts["masks"] == 2 * parts["teacher_masks"] == 2 * 64 * 64 * (1 + 2)
    flash = estimate(cfg, STUDENT, TEACHER, attention="flash_attention_2")
    assert flash.parts["masks"] == 4 * (2 * 64 + 1)


def test_masks_of_an_overlapped_teacher_add_to_the_students():
    cfg = RunConfig()
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch, cfg.data.tokens_per_step = 512, 8, 4096
    alone = estimate(cfg, STUDENT, TEACHER)
    cfg.teacher.overlap = True
    beside = estimate(cfg, STUDENT, TEACHER)
    hidden = beside.parts["teacher_hidden"] - alone.parts["teacher_hidden"]
    assert beside.total - alone.total == hidden + alone.parts["teacher_masks"]


@pytest.mark.parametrize(("dtype", "item", "widths"), [("float32", 4, 10), ("bfloat16", 2, 12)])
def test_activations_of_a_llama_layer_and_copies_of_packed_attention(dtype, item, widths):
    cfg = RunConfig()
    cfg.data.seq_len, cfg.data.sequences_per_micro_batch, cfg.student.dtype = 64, 2, dtype
    size = replace(STUDENT, inner_width=1000)

    def kept(attention, on_cuda):
        return estimate(cfg, size, attention=attention, on_cuda=on_cuda).parts["activations"] / (2 * 64)

    last, layer = 6 * 4 * 256, (widths * 256 + 4 * 1000) * item
    assert kept("sdpa", True) == kept("sdpa", False) == 4 * layer + last
    assert kept("packed", False) == 4 * (layer + 2 * 256 * item) + last
    one_call = dtype == "bfloat16"  # of torch's varlen_attn, which copies nothing
    assert kept("packed", True) == (kept("sdpa", True) if one_call else kept("packed", False))
    cfg.student.activation_checkpointing = True
    assert kept("sdpa", True) == layer + 4 * 256 * item + last
