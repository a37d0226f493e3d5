"""Sizes beyond which torch's attention kernels on CUDA are wrong or cannot be launched. Pure arithmetic.

Known limits, with issue numbers of pytorch/pytorch unless another repository is named:

- With a mask, sdpa uses the memory-efficient kernel, which counts elements of the mask in 32 bits: the forward pass is
  silently wrong beyond 2**32 of S * S (162588, 187227), the backward pass fails beyond 2**31 (147585).
- flash-attention 2, in torch and as a package, adds up the gradient of the queries in a float32 buffer that it indexes
  in 32 bits, every sequence rounded up to 128 tokens and 128 more for every document of packed ones: beyond 2**31
  elements gradients are wrong or the memory access illegal (Dao-AILab/flash-attention 1500, 2260).
- A kernel takes the sequences of a call from a grid axis of at most 65535 (142228, 146704).

S: tokens of a sequence. H: query heads in one call, that is, on one rank after parallel.tp and parallel.cp.
"""

from __future__ import annotations

OFFSETS = 2**31
"""Elements that a signed 32-bit offset can address."""

MAX_SEQUENCES = 65535
"""Most sequences, or documents, in one kernel call."""


def flash_elements(tokens: int, documents: int, heads: int, width: int) -> int:
    """Elements of flash-attention's buffer for `documents` of `tokens` in all, H = heads, head width `width`."""
    return (tokens + 128 * documents) * heads * _rounded(width)


def flash_fits(tokens: int, documents: int, heads: int, width: int) -> bool:
    """Whether one variable-length call of flash-attention can address that many elements."""
    return documents <= MAX_SEQUENCES and flash_elements(tokens, documents, heads, width) < OFFSETS


def size_obstacle(
    implementation: str, *, device_type: str, packed: bool, seq_len: int, sequences: int, heads: int, head_width: int
) -> str | None:
    """The reason why `implementation` must not be used with these sizes, or None.

    packed: documents share sequences, so stock implementations get a mask. seq_len: S of whole sequences, also under
    parallel.cp; sequences: of a micro-batch; heads: H; head_width: the larger of those of keys and values.
    """
    if device_type != "cuda" or implementation == "eager":
        return None
    if implementation == "sdpa" and packed and seq_len * seq_len >= OFFSETS:
        return (
            f"sequences of {seq_len} tokens with a mask between documents are beyond what torch's kernel for masks "
            f"can count in 32 bits (at most {_root(OFFSETS)} tokens): results are silently wrong or the backward fails"
        )
    # packed splits its calls to fit (`kdtrain.models.packed`), so only one document, at most a sequence long, has to
    # fit.
    alone = implementation == "packed"
    if not alone and sequences > MAX_SEQUENCES:
        return f"{sequences} sequences in a micro-batch are more than the {MAX_SEQUENCES} of one attention kernel"
    rows = 1 if alone else sequences
    elements = rows * _up(seq_len, 128) * heads * _rounded(head_width)
    if implementation in ("sdpa", "flash_attention_2", "packed") and elements >= OFFSETS:
        return (
            f"{rows} x {seq_len} tokens with {heads} heads of width {head_width} are {elements} elements, and "
            f"flash-attention's backward pass counts them in 32 bits (fewer than {OFFSETS}): gradients would be wrong"
        )
    return None


def sequences_per_call(length: int, heads: int, width: int) -> int:
    """How many sequences of `length` tokens one call of torch's kernels can hold; at least one."""
    return max(1, min(MAX_SEQUENCES, (OFFSETS - 1) // (_up(length, 128) * heads * _rounded(width))))


def _rounded(width: int) -> int:
    """The head width that flash-attention computes with."""
    return _up(width, 32 if width <= 128 else 64)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _root(limit: int) -> int:
    """The largest n with n * n below `limit`."""
    root = int(limit**0.5) + 1
    while root * root >= limit:
        root -= 1
    return root
