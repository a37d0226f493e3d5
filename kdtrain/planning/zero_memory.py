"""Allocations of DeepSpeed 0.19.8 for a student besides weights and optimizer states, derived from its source.

Bytes on the device of one rank. `docs/results/memory_cpu.md` compares them with allocations of runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kdtrain.config.deepspeed_config import REDUCE_BUCKET, reduce_bucket
from kdtrain.config.schema import ZeroSection

MAX_LIVE, PREFETCH = 1_000_000_000, 50_000_000
"""Most elements of gathered weights that stage 3 keeps and prefetches, unless zero.extra sets them."""


@dataclass(frozen=True, slots=True)
class Share:
    """The student on one rank. parameters: elements, before ZeRO partitions them over zero_size ranks.

    largest: elements of the largest parameter. bfloat16: whether that is the dtype, otherwise float32. micro_batches:
    per step on this rank.
    """

    parameters: float
    largest: float
    zero_size: int
    bfloat16: bool
    micro_batches: int

    @property
    def item(self) -> int:
        """Bytes of a weight."""
        return 2 if self.bfloat16 else 4


@dataclass(frozen=True, slots=True)
class ZeroMemory:
    """gradients: kept until the step. gathered: whole weights that stage 3 assembles.

    bucket: of gradients, from the first gradient of a backward to its end (stage 3: always). reducing: copies of a
    bucket during its reduction. moved: gradients that exist only in the bucket then. step: copies made by the
    optimizer's step. early: buckets are full, hence reduced, while backward still holds activations.
    """

    gradients: float
    step: float
    reducing: float
    bucket: float = 0.0
    moved: float = 0.0
    gathered: float = 0.0
    early: bool = False


def zero_memory(zero: ZeroSection, share: Share, *, on_cuda: bool) -> ZeroMemory:
    """The allocations of one rank for `zero`.

    on_cuda: stage 2 then has two buckets, AdamW is fused, and NCCL reduces without the copy that gloo makes.
    """
    if zero.stage == 0 or (zero.stage == 1 and share.bfloat16 and not zero.offload_optimizer):
        return _without_bucket(zero, share, on_cuda=on_cuda)
    size = reduce_bucket(zero, int(share.parameters))
    reduced = min(share.parameters, max(size, share.largest))  # a gradient larger than a bucket is reduced alone
    early = zero.stage >= 2 and size < share.parameters
    of_stage = {1: _stage_1, 2: _stage_2, 3: _stage_3}[zero.stage]
    return replace(of_stage(zero, share, size, reduced, on_cuda=on_cuda), early=early)


def _stage_1(zero: ZeroSection, share: Share, size: float, reduced: float, *, on_cuda: bool) -> ZeroMemory:
    """Whole float32 gradients, which are moved into the bucket one by one at the beginning of the step."""
    gradients, part = 4 * share.parameters, share.parameters / share.zero_size
    copy = max(0.0, 8 * part - gradients)  # this rank's flattened part, beside the remaining gradients
    return ZeroMemory(
        gradients,
        _step(zero, share, part, copy=copy, fused=on_cuda),
        reducing=4 * reduced,
        bucket=4 * size + _staging(zero, share),
        moved=4 * reduced,
    )


def _stage_2(zero: ZeroSection, share: Share, size: float, reduced: float, *, on_cuda: bool) -> ZeroMemory:
    """Buckets in the model's dtype, which are flattened and, from bfloat16, cast to float32 for the reduction.

    A float32 model adds the parts of two micro-batches, or flattens its only part; a bfloat16 one has one flat part.
    """
    part, offload = share.parameters / share.zero_size, zero.offload_optimizer
    sums = 1 if share.bfloat16 or share.micro_batches == 1 else 2
    copy = 0.0 if share.bfloat16 or sums == 2 else 4 * part
    return ZeroMemory(
        0.0 if offload and not share.bfloat16 else 4 * part * sums,
        _step(zero, share, part, copy=copy, fused=on_cuda),
        reducing=(6 if share.bfloat16 else 4) * reduced,
        bucket=(2 if on_cuda else 1) * share.item * size + _staging(zero, share),
    )


def _stage_3(zero: ZeroSection, share: Share, size: float, reduced: float, *, on_cuda: bool) -> ZeroMemory:
    """A float32 bucket for the whole run, flattened into a copy for the reduction.

    Gathered weights stay until their backward within the limit of live parameters; the next ones are prefetched.
    """
    part, extra = share.parameters / share.zero_size, zero.extra
    live = min(share.parameters, extra.get("stage3_max_live_parameters", MAX_LIVE))
    ahead = min(share.parameters, extra.get("stage3_prefetch_bucket_size", PREFETCH))
    return ZeroMemory(
        0.0 if zero.offload_optimizer else 4 * part,
        _step(zero, share, part, copy=4 * part, fused=on_cuda),
        reducing=(4 if on_cuda else 8) * reduced,
        bucket=4 * size,
        gathered=(live + ahead) * share.item if share.zero_size > 1 else 0.0,
    )


def _without_bucket(zero: ZeroSection, share: Share, *, on_cuda: bool) -> ZeroMemory:
    """Stage 0, and stage 1 of a bfloat16 model: whole float32 gradients, reduced in the step, half a billion at once.

    A bfloat16 model also holds the gradients of the current micro-batch, in bfloat16.
    """
    if zero.stage == 0:  # the engine's own norm: a float64 copy and its squares; AdamW steps parameter by parameter
        step = 16 * share.largest
    else:
        step = _step(zero, share, share.parameters / share.zero_size, copy=0, fused=on_cuda)
    gradients = (4 + 2 * share.bfloat16) * share.parameters
    return ZeroMemory(gradients, step, reducing=4 * min(REDUCE_BUCKET, share.parameters))


def _step(zero: ZeroSection, share: Share, part: float, *, copy: float, fused: bool) -> float:
    """The larger of the float64 copies for the norm, gradient by gradient, and the copies of AdamW's step.

    These are `copy`, of the gradients, and unless AdamW is fused two tensors of this rank's part. 0 with an optimizer
    on the host.
    """
    if zero.offload_optimizer:
        return 0.0
    return max(8 * min(part, share.largest), copy + (0 if fused else 8 * part))


def _staging(zero: ZeroSection, share: Share) -> float:
    """Buffer of a gradient that is copied to the host."""
    return share.largest * share.item if zero.offload_optimizer else 0.0
