"""Will it fit? Bytes per rank from shapes alone, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from kdtrain.config.ranks import teacher_tp
from kdtrain.config.schema import RunConfig
from kdtrain.training.dedicated import in_flight

GIB = 1 << 30
BYTES = {"float32": 4, "bfloat16": 2}
HOST_BYTES_PER_ELEMENT = 20
"""Of an optimizer in host memory."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What the estimate needs of a model: parameters of the full model, width, layers, rows of its head.

    num_expert_parameters: those of num_parameters that are packed into tensors of experts. num_float32_parameters:
    those that stay in float32 in a bfloat16 run.
    """

    num_parameters: int
    width: int
    num_layers: int
    vocab_rows: int
    num_expert_parameters: int = 0
    num_float32_parameters: int = 0

    def weight_bytes(self, dtype: str) -> int:
        """Of all weights in a run's dtype."""
        return self.num_parameters * BYTES[dtype] + self.num_float32_parameters * (4 - BYTES[dtype])


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes per rank, part by part. Activations are the rough one: they depend on the attention kernel.

    parts: of the device. host: what is kept in host memory on purpose, all of it.
    """

    parts: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        """Sum of the device's parts, bytes."""
        return sum(self.parts.values())

    def line(self) -> str:
        """One line for the console."""
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts.items())
        host = f"; in host memory {self.host / GIB:.2f}" if self.host else ""
        return f"estimate {self.total / GIB:.2f} GiB/rank ({parts}{host})"


def estimate_memory(cfg: RunConfig, student: ModelSize, teacher: ModelSize | None, *, dp_size: int) -> MemoryEstimate:
    """Persistent and peak bytes per rank (our derivation, checked against a run by tests/integration).

    Student: weights; an fp32 gradient; fp32 master copy and two Adam moments; ZeRO divides the states (stage >= 1),
    the gradients (>= 2) and the weights (3) by dp x cp. With zero.offload_optimizer the states are on the host, and at
    stage 3 the gradients too; with checkpoint.async_write a copy of the states is. Teacher: weights, whole or cut; of a
    dedicated one the answers that are under way, on the host.
    Loss: two fp32 slabs within train.slab_bytes plus the fp32 gradients it returns. Activations: per layer about
    16 widths per token without recomputation, 1 with it (and one layer's worth).
    """
    tp, stage, offload = cfg.parallel.tp, cfg.zero.stage, cfg.zero.offload_optimizer
    local = student.num_parameters / tp
    cp = cfg.parallel.cp
    tokens, zero_size = cfg.data.sequences_per_micro_batch * cfg.data.seq_len // cp, dp_size * cp
    item = BYTES[cfg.student.dtype]
    per_layer = 16 * tokens * student.width * item
    layers = student.num_layers
    activations = (
        per_layer + layers * tokens * student.width * item
        if cfg.student.activation_checkpointing
        else (layers * per_layer)
    )
    parts = {
        "weights": student.weight_bytes(cfg.student.dtype) / tp / (zero_size if stage == 3 else 1),
        "gradients": 0 if offload and stage == 3 else local * 4 / (zero_size if stage >= 2 else 1),
        "optimizer": 0 if offload else local * 12 / (zero_size if stage >= 1 else 1),
        "activations": activations,
        "loss": min(cfg.train.slab_bytes, 8 * tokens * student.vocab_rows / tp)
        + 4 * (tokens * student.width + student.vocab_rows / tp * student.width),
    }
    # master weights, two moments, the gradient that AdamW reads, and DeepSpeed's buffer beside it
    host = local * HOST_BYTES_PER_ELEMENT / zero_size if offload else 0.0
    if cfg.checkpoint.async_write:  # a copy of what this rank writes; at stage 0 the first data rank writes everything
        host += local * 12 / (zero_size if stage >= 1 else 1)
    if teacher is not None:
        parts |= _teacher_parts(cfg, teacher, tokens, zero_size)
        host += _teacher_on_host(cfg, teacher, zero_size) + _answers(cfg, teacher)
    return MemoryEstimate({name: int(size) for name, size in parts.items()}, int(host))


def estimate_teacher_rank(cfg: RunConfig, teacher: ModelSize, *, dp_size: int) -> MemoryEstimate:
    """Bytes on a rank that holds nothing but the teacher: its weights, and a layer's activations of a micro-batch.

    On the host, of a teacher's first rank: the answers to each of the student's data ranks, kept until they are known
    to have arrived.
    """
    item, tokens = BYTES[cfg.teacher.dtype], cfg.data.sequences_per_micro_batch * cfg.data.seq_len
    tokens = min(tokens, cfg.teacher.max_tokens_per_forward or tokens)
    parts = {
        "weights": teacher.weight_bytes(cfg.teacher.dtype) // teacher_tp(cfg),
        "activations": 16 * tokens * teacher.width * item,
    }
    return MemoryEstimate(parts, int(dp_size * _answers(cfg, teacher)))


def _answers(cfg: RunConfig, teacher: ModelSize) -> float:
    """Hidden states between a dedicated teacher and one data rank: all under way, and a validation's batch besides."""
    if cfg.teacher.layout != "dedicated":
        return 0.0
    tokens = cfg.data.sequences_per_micro_batch * cfg.data.seq_len
    return (in_flight(cfg) + 1) * tokens * teacher.width * BYTES[cfg.teacher.dtype]


def _teacher_parts(cfg: RunConfig, teacher: ModelSize, tokens: int, zero_size: int) -> dict[str, float]:
    """Weights on this rank and the hidden states that wait for the loss."""
    t, tp, item = cfg.teacher, cfg.parallel.tp, BYTES[cfg.teacher.dtype]
    if t.layout == "dedicated":
        head = teacher.vocab_rows * teacher.width * item / tp
        return {"teacher_head": head, "teacher_hidden": tokens * teacher.width * item}
    cut = teacher_tp(cfg)
    weights = _teacher_bytes(cfg, teacher) / cut
    hidden = 2 * tokens * teacher.width * item * max(1, cut // tp) * (2 if t.overlap else 1)
    if t.zero_stage == 0:
        return {"teacher": weights, "teacher_hidden": hidden}
    # The pieces, two gathered layers, and the head's rows; hidden states of the whole step.
    head = teacher.vocab_rows * teacher.width * item / max(cut, tp)
    layers = 2 * weights / max(1, teacher.num_layers)
    pieces = 0.0 if t.offload else weights / (zero_size * tp / cut)
    micro_batches = cfg.data.tokens_per_step / (zero_size * tokens)
    return {"teacher": pieces + layers + head, "teacher_hidden": hidden * micro_batches}


def _teacher_bytes(cfg: RunConfig, teacher: ModelSize) -> float:
    """Of all weights. Quantised, an element of the decoder takes one byte; embedding, head and experts stay whole.

    A run holds the teacher as it was read for a moment, before the student's optimizer exists.
    """
    item = BYTES[cfg.teacher.dtype]
    if cfg.teacher.quantize is None:
        return float(teacher.weight_bytes(cfg.teacher.dtype))
    kept = 2 * teacher.vocab_rows * teacher.width + teacher.num_expert_parameters + teacher.num_float32_parameters
    decoder = max(0, teacher.num_parameters - kept)
    return float(teacher.weight_bytes(cfg.teacher.dtype) - decoder * (item - 1))


def _teacher_on_host(cfg: RunConfig, teacher: ModelSize, dp_size: int) -> float:
    """This rank's pieces, which are the same part of the weights however the teacher is cut besides."""
    t = cfg.teacher
    return teacher.weight_bytes(t.dtype) / (dp_size * cfg.parallel.tp) if t.offload else 0.0
