"""Section data: token stores, and how many tokens make a step."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class DataSection:
    """Where tokens come from and how many make a step."""

    train: list[str] = field(default_factory=list)
    """Token stores, one path or several to blend. Their order changes nothing: each draws by its fingerprint."""
    train_weights: list[float] | None = None
    """Share of each store in data.train, normalised to sum 1. null: in proportion to their tokens."""
    validation: str | None = None
    """Token store for evaluation. null: no evaluation."""
    seq_len: int = 1024
    """Tokens per packed sequence. More than either model has positions for is refused, and more than its config names
    (`max_position_embeddings`) warned of."""
    tokens_per_step: int = 524288
    """Tokens per optimizer step over all ranks; a multiple of seq_len * sequences_per_micro_batch * dp."""
    sequences_per_micro_batch: int = 8
    """Sequences per data rank in one forward and backward pass. Changes memory and speed, never the result."""
    reset_positions: bool = True
    """Restart position_ids at each document and hide documents packed together from each other."""
    sequence_prefix: str = "auto"
    """What begins every packed sequence: a token of the tokenizer, none, or auto. auto takes what the teacher's
    tokenizer puts before a text, most often one `<bos>`, if the teacher predicts 64 sequences that begin inside a
    document better with it than without; with student.weights and no teacher, the student's; else none. Decided once,
    when a run begins; a new stage (run.continue_from) without a teacher keeps that of the run it continues from. A
    prefix takes its place from the seq_len tokens and is not predicted."""
    allow_worse_prefix: bool = False
    """Accept an explicit sequence_prefix with which the teacher is worse by 0.05 nats per token or more."""
    prefetch: int = 2
    """Steps prepared ahead by a background thread; 0 prepares in line."""
