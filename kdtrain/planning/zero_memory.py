"""What DeepSpeed 0.19.8 allocates for a student besides weights and optimizer states, and when. Read in its source.

Bytes on the device of one rank. `docs/results/memory_cpu.md` holds them against what runs allocated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kdtrain.config.deepspeed_config import REDUCE_BUCKET, reduce_bucket
from kdtrain.config.schema import ZeroSection

MAX_LIVE, PREFETCH = 1_000_000_000, 50_000_000
"""Elements of gathered weights that stage 3 keeps, and fetches ahead, at most, unless zero.extra says otherwise."""


@dataclass(frozen=True, slots=True)
class Share:
    """Of the student on one rank. parameters: elements, before ZeRO divides them among zero_size ranks.

    largest: elements of its largest parameter. bfloat16: its dtype, or float32. micro_batches: of a step, on this rank.
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
    """gradients: all that is kept of them, until the step. gathered: whole weights that stage 3 puts together.

    bucket: of gradients, from the first one of a backward to its end (stage 3: always). reducing: copies of a bucket
    while it is reduced. moved: gradients that live in the bucket then, and nowhere else. step: copies that the
    optimizer's step makes. early: buckets are full, hence reduced, while backward still holds activations.
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
    reduced = min(share.parameters, max(size, share.largest))  # a gradient that fits no bucket is reduced alone
    early = zero.stage >= 2 and size < share.parameters
    of_stage = {1: _stage_1, 2: _stage_2, 3: _stage_3}[zero.stage]
    return replace(of_stage(zero, share, size, reduced, on_cuda=on_cuda), early=early)


def _stage_1(zero: ZeroSection, share: Share, size: float, reduced: float, *, on_cuda: bool) -> ZeroMemory:
    """Whole float32 gradients, which move into the bucket one by one when the step begins."""
    gradients, part = 4 * share.parameters, share.parameters / share.zero_size
    copy = max(0.0, 8 * part - gradients)  # this rank's part, flattened, beside what is left of them
    return ZeroMemory(
        gradients,
        _step(zero, share, part, copy=copy, fused=on_cuda),
        reducing=4 * reduced,
        bucket=4 * size + _staging(zero, share),
        moved=4 * reduced,
    )


def _stage_2(zero: ZeroSection, share: Share, size: float, reduced: float, *, on_cuda: bool) -> ZeroMemory:
    """Buckets in the model's dtype, flattened and, from bfloat16, cast to float32 when they are reduced. A float32
    model adds up parts of two micro-batches, or flattens the one part it has; a bfloat16 one has one flat part."""
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
    """A float32 bucket for the whole run, copied flat to be reduced; gathered weights stay until their backward if
    there is room, and the next ones are put together from pieces that were fetched ahead."""
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

    Under bfloat16 the gradients of the present micro-batch are there besides, in bfloat16.
    """
    if zero.stage == 0:  # the norm is ours: a float64 copy and its squares; AdamW steps one parameter at a time
        step = 16 * share.largest
    else:
        step = _step(zero, share, share.parameters / share.zero_size, copy=0, fused=on_cuda)
    gradients = (4 + 2 * share.bfloat16) * share.parameters
    return ZeroMemory(gradients, step, reducing=4 * min(REDUCE_BUCKET, share.parameters))


def _step(zero: ZeroSection, share: Share, part: float, *, copy: float, fused: bool) -> float:
    """The larger of: float64 copies for the norm, a gradient at a time; and `copy`, of the gradients, beside what
    torch's AdamW computes with: two tensors of this rank's part unless it is fused. Nothing if it runs on the host."""
    if zero.offload_optimizer:
        return 0.0
    return max(8 * min(part, share.largest), copy + (0 if fused else 8 * part))


def _staging(zero: ZeroSection, share: Share) -> float:
    """A gradient on its way to the host."""
    return share.largest * share.item if zero.offload_optimizer else 0.0
