"""Small trials of a run's operations: row kernels against float64, collectives along each axis."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from kdtrain_kernels.dispatch import BACKENDS, divergences_of, row_kernels
from torch import Tensor

from kdtrain.distributed.collectives import (
    Group,
    exchange_ranks,
    gather_objects,
    gather_ranks,
    group_rank,
    group_size,
    reduce_sum_,
)
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import linear_kd_loss, reference

TOKENS, VOCAB, WIDTHS = 37, 1001, (32, 48)
"""Size of the loss that is compared with float64; student's and teacher's width."""
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}
"""Largest error of loss or gradient, relative to its largest element."""
BROKEN = (ValueError, ImportError, RuntimeError, OSError, subprocess.CalledProcessError)
"""Errors of a kernel that cannot be found, compiled or run."""
CPU_BYTES, CUDA_BYTES = 1 << 23, 1 << 28
"""Size of the buffers that collectives are timed with."""
REPEATS = 3


Result = Literal["ok", "FAIL", "warn", "-"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    result: "-" for a finding that does not apply or only informs; "warn" if a run works, but perhaps not as intended.
    """

    check: str
    result: Result
    found: str

    @classmethod
    def judged(cls, check: str, good: bool, found: str) -> Row:
        """ok or FAIL."""
        return cls(check, "ok" if good else "FAIL", found)


def kernel_rows(mesh: Mesh, device: torch.device, wanted: str) -> list[Row]:
    """Every divergence's loss and gradients against float64, by each backend that all ranks have.

    First on each rank alone, then sharded over tp. A backend that is not available fails only if it is `wanted`
    (train.kernels). Communicates over tp, and a gather over the world per backend.
    """
    rows = []
    for backend in BACKENDS:
        refused, kind = "", ""
        try:
            row_kernels(backend, device)
            kind = "FAIL"  # the backend is available: an error from here on is a failure
            for dtype in TOLERANCE:
                loss_error("forward_kl", Mesh(), device, dtype, backend)
        except BROKEN as error:
            refused = f"{type(error).__name__}: {error}".removeprefix("ValueError: ").partition("\n")[0]
        # all ranks must leave out a backend that one of them lacks: the sharded loss communicates over tp
        if trouble := [(why, bad) for why, bad in gather_objects((refused, kind), mesh.world_group) if why]:
            why, bad = trouble[0]
            rows.append(Row(f"kernels {backend}", "FAIL" if bad or backend == wanted else "-", why))
            continue
        rows += [_compared(mesh, device, dtype, backend) for dtype in TOLERANCE]
    return rows


def _compared(mesh: Mesh, device: torch.device, dtype: torch.dtype, backend: str) -> Row:
    errors = {name: loss_error(name, mesh, device, dtype, backend) for name in divergences_of(backend)}
    worst = max(errors, key=lambda name: errors[name])
    return Row.judged(
        f"kernels {backend} {str(dtype).removeprefix('torch.')}",
        errors[worst] <= TOLERANCE[dtype],
        f"{len(errors)} divergences over tp {mesh.tp_size}: gradients within {TOLERANCE[dtype]:g} of float64"
        if errors[worst] <= TOLERANCE[dtype]
        else f"over tp {mesh.tp_size}: {worst} is off by {errors[worst]:.1e}",
    )


def loss_error(divergence: str, mesh: Mesh, device: torch.device, dtype: torch.dtype, backend: str) -> float:
    """Largest relative error of loss, d(hidden) and d(head) of a small problem; inf if one is not finite.

    Communicates over tp, as the loss does.
    """
    rng = torch.Generator().manual_seed(1)
    shard = VocabShard.of(VOCAB, mesh.tp_rank, mesh.tp_size)
    total_rows = shard.rows * mesh.tp_size
    hidden = [torch.randn(TOKENS, width, generator=rng).to(device, dtype) for width in WIDTHS]
    heads = [(torch.randn(total_rows, w, generator=rng) / w**0.5).to(device, dtype) for w in WIDTHS]
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=rng).to(device)
    weights = [torch.full((TOKENS,), share, device=device) for share in (0.7, 0.3)]
    mine = slice(shard.start, shard.stop)

    student, head = hidden[0].clone().requires_grad_(), heads[0][mine].clone().requires_grad_()
    loss = linear_kd_loss(
        student,
        head,
        hidden[1],
        heads[1][mine],
        labels,
        divergence=divergence,
        temperature=2.0,
        shard=shard,
        kd_weight=weights[0],
        ce_weight=weights[1],
        group=mesh.tp_group,
        slab_bytes=1 << 20,
        backend=backend,
    ).loss
    loss.backward()

    expected, grad_hidden, grad_head = _reference_of(divergence, hidden, heads, labels, weights)
    pairs = ((loss.detach(), expected), (_grad(student), grad_hidden), (_grad(head), grad_head[mine]))
    return max(_relative(found, right) for found, right in pairs)


def _reference_of(
    divergence: str, hidden: list[Tensor], heads: list[Tensor], labels: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, d(hidden) and d(head) of the student in float64, on whole heads."""
    x, w = (tensor.double().requires_grad_() for tensor in (hidden[0], heads[0]))
    expected = reference.total_loss(
        reference.head_logits(x, w, VOCAB),
        reference.head_logits(hidden[1], heads[1], VOCAB),
        labels,
        divergence=divergence,
        temperature=2.0,
        kd_weight=weights[0],
        ce_weight=weights[1],
    )
    expected.backward()
    return expected.detach(), _grad(x), _grad(w)


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _relative(found: Tensor, right: Tensor) -> float:
    error = float((found.double() - right).abs().max() / right.abs().max().clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf


def collective_rows(mesh: Mesh, device: torch.device) -> list[Row]:
    """All-reduce, all-gather and all-to-all over tp, cp, dp and the world: results, and bytes per second.

    Communicates over each of them. The rate is that of the slowest rank: bytes of this rank's buffer per second.
    """
    rows = []
    axes = (("tp", mesh.tp_group), ("cp", mesh.cp_group), ("dp", mesh.dp_group), ("world", mesh.world_group))
    for axis, group in axes:
        size = group_size(group)
        if size == 1:
            rows.append(Row(f"collectives {axis}", "-", "one rank"))
            continue
        for name, check in (("all-reduce", _all_reduce), ("all-gather", _all_gather), ("all-to-all", _all_to_all)):
            right, seconds, moved = check(group, device)
            # a collective is as slow as its slowest rank
            slowest = max(gather_objects(seconds, mesh.world_group))
            what = f"{size} ranks, {moved / 2**20:.0f} MiB in {1e3 * slowest:.1f} ms: {moved / slowest / 1e9:.2f} GB/s"
            rows.append(Row.judged(f"{name} {axis}", right, what if right else f"{size} ranks: wrong numbers"))
    return rows


def _buffer(ranks: int, device: torch.device) -> Tensor:
    """A buffer [ranks, n] of small integers, whose sums over ranks are exact in float32."""
    columns = (CUDA_BYTES if device.type == "cuda" else CPU_BYTES) // 4 // ranks
    return torch.arange(columns, device=device).remainder(251).float().repeat(ranks, 1)


def _all_reduce(group: Group, device: torch.device) -> tuple[bool, float, int]:
    size, rank = group_size(group), group_rank(group)
    base = _buffer(size, device)
    found = reduce_sum_(base + rank, group)
    right = torch.equal(found, base * size + size * (size - 1) // 2)
    return right, _time(lambda: reduce_sum_(found, group), device), base.nbytes


def _all_gather(group: Group, device: torch.device) -> tuple[bool, float, int]:
    size, rank = group_size(group), group_rank(group)
    part = _buffer(size, device)[0]
    found = gather_ranks(part + rank, group)
    right = all(torch.equal(found[other], part + other) for other in range(size))
    return right, _time(lambda: gather_ranks(part, group), device), found.nbytes


def _all_to_all(group: Group, device: torch.device) -> tuple[bool, float, int]:
    size, rank = group_size(group), group_rank(group)
    base = _buffer(size, device)
    to = torch.arange(size, device=device).float()[:, None]
    found = exchange_ranks(base + 1000 * rank + to, group)  # row j goes to rank j
    right = torch.equal(found, base + 1000 * to + rank)
    return right, _time(lambda: exchange_ranks(base, group), device), base.nbytes


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds per call, after one warm-up call."""
    work()
    _wait(device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        work()
    _wait(device)
    return (time.perf_counter() - started) / REPEATS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
