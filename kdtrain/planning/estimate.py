"""Memory estimate: bytes per rank from shapes and settings alone, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from kdtrain.config.schema import DataSection, ParallelSection, StudentSection, TeacherSection, ZeroSection
from kdtrain.models.attention import ONE_MASK, PACKED
from kdtrain.planning.zero_memory import Share, ZeroMemory, zero_memory

GIB = 1 << 30
BYTES = {"float32": 4, "bfloat16": 2}
HOST_BYTES_PER_ELEMENT = 20
"""Bytes per parameter of an optimizer in host memory."""


@dataclass(frozen=True, slots=True)
class MemoryInputs:
    """The sections of a configuration that an estimate reads, and single values of others.

    teacher_tp: ranks over which the teacher is cut. in_flight: micro-batches under way between a data rank and a
    dedicated teacher. slab_bytes: budget of the loss's logits. async_write: whether checkpoints are copied to the host.
    """

    student: StudentSection
    teacher: TeacherSection
    data: DataSection
    parallel: ParallelSection
    zero: ZeroSection
    teacher_tp: int
    in_flight: int
    slab_bytes: int
    async_write: bool


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a model: parameters of the full model, width, layers, rows of its head.

    num_expert_parameters: those of num_parameters that are packed into tensors of experts. num_float32_parameters:
    those that stay in float32 in a bfloat16 run. num_heads: of attention, for eager; 0: not known. inner_width: of the
    MLP; 0: not known.
    """

    num_parameters: int
    width: int
    num_layers: int
    vocab_rows: int
    num_expert_parameters: int = 0
    num_float32_parameters: int = 0
    num_heads: int = 0
    inner_width: int = 0

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all weights in a run of `dtype`."""
        return self.num_parameters * BYTES[dtype] + self.num_float32_parameters * (4 - BYTES[dtype])


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes per rank by part. Activations are the least exact: they depend on the architecture.

    parts: of the device, each at its own maximum. not_at_once: by how much their sum exceeds the largest amount at one
    time, as a step's copies are made after the activations are freed. host: all that is kept in host memory by choice.
    """

    parts: dict[str, int]
    host: int = 0
    not_at_once: int = 0

    @property
    def total(self) -> int:
        """The largest amount on the device at one time, bytes."""
        return sum(self.parts.values()) - self.not_at_once

    def line(self) -> str:
        """One line for the console."""
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts.items() if size)
        apart = f"; {self.not_at_once / GIB:.2f} of it not at once" if self.not_at_once * 100 > GIB else ""
        host = f"; in host memory {self.host / GIB:.2f}" if self.host else ""
        return f"estimate {self.total / GIB:.2f} GiB/rank ({parts}{apart}{host})"


def estimate_memory(
    run: MemoryInputs,
    student: ModelSize,
    teacher: ModelSize | None,
    *,
    dp_size: int,
    on_cuda: bool,
    student_attention: str,
    teacher_attention: str = "sdpa",
) -> MemoryEstimate:
    """Persistent and peak bytes per rank (our derivation; docs/results/memory_cpu.md compares it with runs).

    Student: weights; an fp32 gradient; fp32 master copy (at stage 0 the weights) and two Adam moments; ZeRO divides the
    states (stage >= 1), the gradients (>= 2) and the weights (3) by dp x cp; and what DeepSpeed allocates to do so
    (`zero_memory`). With zero.offload_optimizer the states are on the host, and at stage 3 the gradients too; with
    checkpoint.async_write a copy of the states is. Teacher: weights, whole or sharded; for a dedicated one the hidden
    states in flight, on the host. Loss: two fp32 slabs within train.slab_bytes plus its gradients, in fp32 and,
    where it differs, in the weights' dtype. Activations: as `_layer_width` without recomputation, 1 width with it
    (and one layer's worth), and what backward begins with. Masks: as `mask_bytes` for each attention, an
    implementation's name, of which "auto" is none.
    """
    tp, stage, offload, cp = run.parallel.tp, run.zero.stage, run.zero.offload_optimizer, run.parallel.cp
    local = student.num_parameters / tp
    tokens, zero_size = run.data.sequences_per_micro_batch * run.data.seq_len // cp, dp_size * cp
    item = BYTES[run.student.dtype]
    zero = _zero_memory(run, student, tokens, zero_size, on_cuda=on_cuda)
    parts = {
        "weights": student.weight_bytes(run.student.dtype) / tp / (zero_size if stage == 3 else 1),
        "gathered": zero.gathered,
        "gradients": zero.gradients,
        "optimizer": 0 if offload else local * 12 / zero_size if stage >= 1 else local * 8,
        "buckets": zero.bucket + zero.reducing,
        "step": zero.step,
        "activations": _activations(run, student, tokens, student_attention, on_cuda=on_cuda),
        "masks": _student_masks(run, student, student_attention),
        "loss": min(run.slab_bytes, 8 * tokens * student.vocab_rows / tp)
        + (6 if item == 2 else 4) * (tokens * student.width + student.vocab_rows / tp * student.width),
    }
    # master weights, two moments, the gradient that AdamW reads, and DeepSpeed's buffer beside it
    host = local * HOST_BYTES_PER_ELEMENT / zero_size if offload else 0.0
    if run.async_write:  # a copy of what this rank writes; at stage 0 the first data rank writes everything
        host += local * 12 / (zero_size if stage >= 1 else 1)
    if teacher is not None:
        parts |= _teacher_parts(run, teacher, tokens, zero_size, teacher_attention)
        host += _teacher_on_host(run, teacher, zero_size) + _in_flight_bytes(run, teacher)
    return MemoryEstimate({name: int(size) for name, size in parts.items()}, int(host), int(_apart(run, parts, zero)))


def _zero_memory(run: MemoryInputs, student: ModelSize, tokens: int, zero_size: int, *, on_cuda: bool) -> ZeroMemory:
    tp = run.parallel.tp
    largest = min(student.num_parameters, student.vocab_rows * student.width) / tp  # the embedding, as a rule
    micro_batches = max(1, run.data.tokens_per_step // max(1, zero_size * tokens))
    bfloat16 = run.student.dtype == "bfloat16"
    share = Share(student.num_parameters / tp, largest, zero_size, bfloat16, micro_batches)
    return zero_memory(run.zero, share, on_cuda=on_cuda)


def _activations(run: MemoryInputs, student: ModelSize, tokens: int, attention: str, *, on_cuda: bool) -> float:
    """Activations of all layers, or of one with checkpointing; and the last norm and its gradient, 6 float32 widths."""
    item, layers = BYTES[run.student.dtype], student.num_layers
    copied = attention == PACKED and run.data.reset_positions and not (on_cuda and item == 2)
    per_layer = _layer_width(student, item, copied=copied) * tokens * item
    last = 6 * 4 * student.width * tokens
    if run.student.activation_checkpointing:
        return per_layer + layers * tokens * student.width * item + last
    return layers * per_layer + last


def _layer_width(size: ModelSize, item: int, *, copied: bool) -> float:
    """Elements per token that a layer keeps for backward; 16 widths if the inner one is not known.

    Queries, keys, values and output 4 widths; two norms 3 each, 4 where they compute in float32 beside bfloat16; a
    gated MLP 4 inner widths. copied: packed attention runs document by document, so its output is assembled in a copy,
    and short documents are gathered in further copies (up to 3 widths if long ones share the batch; 1 is counted).
    """
    if not size.inner_width:
        return 16 * size.width
    return (10 if item == 4 else 12) * size.width + 4 * size.inner_width + (2 * size.width if copied else 0)


def _apart(run: MemoryInputs, parts: dict[str, float], zero: ZeroMemory) -> float:
    """The sum of all parts minus the largest amount at one time.

    That is in the teacher's forward (unless it overlaps the student's), in backward, at the reduction of gradients or
    in the optimizer's step.
    """
    ahead = parts.get("teacher_masks", 0)
    forward = parts["activations"] + parts["masks"] + parts["loss"] + zero.gathered
    kept = zero.bucket if run.zero.stage == 3 else 0
    moments = (
        forward + zero.bucket + (zero.reducing if zero.early else 0) + (ahead if run.teacher.overlap else 0),
        ahead + kept,
        zero.gathered + zero.bucket + zero.reducing - zero.moved,
        zero.step + kept,
    )
    return forward + parts["buckets"] + parts["step"] + ahead - max(moments)


def mask_bytes(
    attention: str, *, sequences: int, seq_len: int, item: int, layers: int, heads: int = 0, packed: bool = True
) -> int:
    """Bytes of attention that grow with seq_len squared; for flash and packed attention only document boundaries.

    sequences: in one forward. item: bytes of an activation. layers: number of those kept for backward. heads: on this
    rank; 0: not known. packed: documents do not attend to each other; without it sdpa needs no mask.
    sdpa: one boolean mask for all layers, and per layer the additive mask that torch derives and saves; with ONE_MASK
    one boolean and one additive mask. eager: one additive mask for all layers, and per layer the probabilities of all
    heads, in float32 and in the dtype.
    """
    square = sequences * seq_len**2
    if attention == ONE_MASK:
        return square * (1 + item) if packed else 0
    if attention == "sdpa":
        return square * (1 + item * layers) if packed else 0
    if attention == "eager":
        return square * (1 + item) + square * heads * layers * (4 if item == 4 else 4 + item)
    return 4 * (sequences * seq_len + 1)


def _student_masks(run: MemoryInputs, student: ModelSize, attention: str) -> float:
    """With parallel.cp, a rank has whole sequences and a part of the heads inside attention."""
    layers = 1 if run.student.activation_checkpointing else student.num_layers
    return mask_bytes(
        attention,
        sequences=run.data.sequences_per_micro_batch,
        seq_len=run.data.seq_len,
        item=BYTES[run.student.dtype],
        layers=layers,
        heads=student.num_heads // (run.parallel.tp * run.parallel.cp),
        packed=run.data.reset_positions,
    )


def estimate_teacher_rank(run: MemoryInputs, teacher: ModelSize, *, dp_size: int, attention: str) -> MemoryEstimate:
    """Bytes on a rank of a dedicated teacher: its weights, one layer's activations of a micro-batch, and masks.

    attention: name of an implementation. Host memory, on a teacher's first rank: the hidden states for each of the
    student's data ranks, kept until their receipt is confirmed.
    """
    item, tokens = BYTES[run.teacher.dtype], run.data.sequences_per_micro_batch * run.data.seq_len
    tokens = min(tokens, run.teacher.max_tokens_per_forward or tokens)
    parts = {
        "weights": teacher.weight_bytes(run.teacher.dtype) // run.teacher_tp,
        "activations": 16 * tokens * teacher.width * item,
        "masks": int(_teacher_masks(run, teacher, attention, tokens // run.data.seq_len)),
    }
    return MemoryEstimate(parts, int(dp_size * _in_flight_bytes(run, teacher)))


def _in_flight_bytes(run: MemoryInputs, teacher: ModelSize) -> float:
    """Hidden states between a dedicated teacher and one data rank: those in flight, and one batch of validation."""
    if run.teacher.layout != "dedicated":
        return 0.0
    tokens = run.data.sequences_per_micro_batch * run.data.seq_len
    return (run.in_flight + 1) * tokens * teacher.width * BYTES[run.teacher.dtype]


def _teacher_parts(
    run: MemoryInputs, teacher: ModelSize, tokens: int, zero_size: int, attention: str
) -> dict[str, float]:
    """Weights on this rank, the hidden states that are kept for the loss, and the masks of one forward."""
    t, tp, item = run.teacher, run.parallel.tp, BYTES[run.teacher.dtype]
    if t.layout == "dedicated":
        head = teacher.vocab_rows * teacher.width * item / tp
        return {"teacher_head": head, "teacher_hidden": tokens * teacher.width * item}
    cut = run.teacher_tp
    weights = _teacher_bytes(run, teacher) / cut
    replicas = max(1, cut // tp)  # replicas of the student that share one teacher
    hidden = 2 * tokens * teacher.width * item * replicas * (2 if t.overlap else 1)
    sequences = run.data.sequences_per_micro_batch * replicas
    if t.layout == "plain":  # tp ranks divide the sequences
        sequences = -(-sequences // tp)
    if t.zero_stage == 0:
        masks = _teacher_masks(run, teacher, attention, sequences)
        return {"teacher": weights, "teacher_hidden": hidden, "teacher_masks": masks}
    # ZeRO-3: this rank's partition, two gathered layers, and the head's rows; hidden states of the whole step.
    head = teacher.vocab_rows * teacher.width * item / max(cut, tp)
    layers = 2 * weights / max(1, teacher.num_layers)
    pieces = 0.0 if t.offload else weights / (zero_size * tp / cut)
    micro_batches = run.data.tokens_per_step / (zero_size * tokens)
    masks = _teacher_masks(run, teacher, attention, int(sequences * micro_batches))
    return {"teacher": pieces + layers + head, "teacher_hidden": hidden * micro_batches, "teacher_masks": masks}


def _teacher_masks(run: MemoryInputs, teacher: ModelSize, attention: str, sequences: int) -> float:
    """Masks of one layer in a forward of `sequences`, or of as many as teacher.max_tokens_per_forward allows."""
    if (limit := run.teacher.max_tokens_per_forward) is not None:
        sequences = min(sequences, max(1, limit // run.data.seq_len))
    return mask_bytes(
        attention,
        sequences=sequences,
        seq_len=run.data.seq_len,
        item=BYTES[run.teacher.dtype],
        layers=1,
        heads=teacher.num_heads // run.teacher_tp,
        packed=run.data.reset_positions,
    )


def _teacher_bytes(run: MemoryInputs, teacher: ModelSize) -> float:
    """Bytes of all weights. A quantised decoder takes one byte per element; embedding, head and experts keep theirs.

    The unquantised teacher exists for a short time only, before the student's optimizer is built.
    """
    item = BYTES[run.teacher.dtype]
    if run.teacher.quantize is None:
        return float(teacher.weight_bytes(run.teacher.dtype))
    kept = 2 * teacher.vocab_rows * teacher.width + teacher.num_expert_parameters + teacher.num_float32_parameters
    decoder = max(0, teacher.num_parameters - kept)
    return float(teacher.weight_bytes(run.teacher.dtype) - decoder * (item - 1))


def _teacher_on_host(run: MemoryInputs, teacher: ModelSize, dp_size: int) -> float:
    """Bytes of this rank's partition in host memory, the same share of the weights for any tp."""
    t = run.teacher
    return teacher.weight_bytes(t.dtype) / (dp_size * run.parallel.tp) if t.offload else 0.0
