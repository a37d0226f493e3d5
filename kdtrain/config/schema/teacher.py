"""Section teacher: the frozen model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdtrain.config.schema.types import Attention, Dtype

Quantization = Literal["int8", "fp8"]


@dataclass(kw_only=True, slots=True)
class TeacherSection:
    """The frozen model."""

    weights: str | None = None
    """Hugging Face model folder. Needed by objective distill, optional (for evaluation only) with pretrain. Its
    tokenizer may differ from the data's in added tokens that the data does not hold."""
    dtype: Dtype = "bfloat16"
    """Dtype of weights and activations, but for tensors that transformers keeps in float32 (routers of mixtures)."""
    attention: Attention = "auto"
    """As student.attention."""
    allow_unused_weights: bool = False
    """As student.allow_unused_weights."""
    layout: Literal["plain", "tp", "dedicated"] = "plain"
    """plain: a whole copy per rank; tp ranks share out the sequences. tp: cut over teacher.tp ranks. dedicated: on
    teacher.ranks ranks of its own, which hold no student and run ahead while the student's ranks train."""
    tp: int | None = None
    """With layout tp: ranks over which the teacher is cut, parallel.tp or a multiple of it; replicas of the student
    then share one teacher; null: parallel.tp. With layout dedicated: ranks that hold one teacher together; null: 1."""
    ranks: int | None = None
    """With layout dedicated: how many of the job's ranks, the last ones, hold only the teacher. They make
    teacher.ranks / teacher.tp teachers, which share out the micro-batches."""
    in_flight: int | None = None
    """With layout dedicated: micro-batches of a data rank that may be in flight at a time; each needs room for its
    hidden states in host memory, on both sides. null: two per teacher, at least 4."""
    zero_stage: int = 0
    """0: weights stay on every data rank. 3: they are divided among data ranks by ZeRO-3 and gathered layer by layer;
    the teacher then runs once over all micro-batches of a step."""
    offload: bool = False
    """With zero_stage 3: keep the divided weights in host memory."""
    quantize: Quantization | None = None
    """Weights of the decoder's linear layers in 8 bits, one scale per output row, by torchao: int8, or fp8
    (float8_e4m3). Activations, embedding, norms and head keep their dtype. The divergence from the unquantised teacher
    is measured on the first micro-batch. Not with zero_stage 3."""
    max_tokens_per_forward: int | None = None
    """Limit of one forward pass of the teacher on a rank; bounds its activations, never changes the result. With
    zero_stage 3 every pass gathers all weights once. null: a micro-batch, with zero_stage 3 a whole step, at once."""
    overlap: bool = False
    """On CUDA: run the teacher on the next micro-batch while the student trains on the current one, on a second
    stream. Costs the hidden states of one more micro-batch. On other devices the same calls run one after another."""
