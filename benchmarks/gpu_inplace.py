"""Gradients that are rounded to bfloat16 over the memory of their own logits, element by element.

The reference is the same kernel's gradient kept in float32 and rounded afterwards: rounding in place must not change a
bit, at any width, in any of several runs. This detects a thread that reads a logit after another thread has overwritten
it; the norm of a whole gradient, which gpu_correct.py compares, hides single elements. On the CPU the torch kernels
round in place too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from gpu_common import Setting, check
from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.dispatch import TRITON_DIVERGENCES, row_kernels
from kdtrain_kernels.divergences import divergence_spec
from kdtrain_kernels.sparse_dispatch import sparse_kernels
from kdtrain_kernels.sparse_table import SparseGradient
from kdtrain_kernels.torch_rows import LogitMap, RowWeights
from torch import Tensor

SIZES = ((4096, 257), (4096, 2049), (2048, 6145), (2048, 50257), (1040, 128256), (512, 262144), (7, 1))
"""(rows, columns): less than a block of a kernel, a block and a column, then many blocks; and a single column."""
MAPS = ((1.0, None), (2.0, 30.0))
"""(temperature, soft cap of the logits)"""
REPEATS = {"triton": 8, "torch": 1}
"""The torch kernels round through a copy, so no thread can store early."""
IDS = 64

Gradient = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""(student's slab, teacher's slab, dtype to round to) -> the gradient, in the student's memory."""


def poisoned_slab(setting: Setting, rows: int, columns: int) -> Tensor:
    """[C, n] float32 view of rows that are a multiple of 128 apart; nan, padding included."""
    stride = -(-columns // 128) * 128
    return torch.full((rows, stride), torch.nan, device=setting.device)[:, :columns]


def random_slab(setting: Setting, rows: int, columns: int) -> Tensor:
    """The same with logits of standard deviation 3; padding is nan."""
    return poisoned_slab(setting, rows, columns).normal_(std=3.0)


def copy_of(setting: Setting, slab: Tensor) -> Tensor:
    """In memory of its own, padding filled with NaN again."""
    return poisoned_slab(setting, *slab.shape).copy_(slab)


def inplace(setting: Setting) -> Iterator[dict]:
    """Every divergence's gradient, cross-entropy's and the sparse one's, with and without a cap, at all sizes."""
    for count, columns in SIZES:
        rows = setting.rows(count)
        student, teacher = random_slab(setting, rows, columns), random_slab(setting, rows, columns)
        labels = torch.randint(columns, (rows,), device=setting.device)
        for backend in setting.backends():
            for name in ("cross_entropy", "sparse", *TRITON_DIVERGENCES):
                worst, wrong = 0.0, 0
                for temperature, cap in MAPS:
                    make = gradient_of(setting, backend, name, (student, teacher, labels), temperature, cap)
                    found = compared(setting, make, (student, teacher), REPEATS[backend])
                    worst, wrong = max(worst, found[0]), wrong + found[1]
                shape = f"C={rows} n={columns}"
                yield check(f"inplace {name} {backend}", shape, float(wrong), 0.0, f"elements; largest {worst:.1e}")


def compared(setting: Setting, make: Gradient, slabs: tuple[Tensor, Tensor], repeats: int) -> tuple[float, int]:
    """(largest difference, number of elements) between the gradient rounded in place and rounded afterwards."""

    def answer(dtype: torch.dtype) -> Tensor:
        return make(copy_of(setting, slabs[0]), copy_of(setting, slabs[1]), dtype)

    want = answer(torch.float32).to(torch.bfloat16)
    worst, wrong = 0.0, 0
    for _ in range(repeats):
        got = answer(torch.bfloat16)
        different = got != want  # nan differs
        wrong += int(different.sum())
        worst = max(worst, float((got.float() - want.float()).abs().nan_to_num(torch.inf).max()))
    return worst, wrong


def gradient_of(
    setting: Setting, backend: str, name: str, inputs: tuple, temperature: float, cap: float | None
) -> Gradient:
    """One gradient kernel with everything that comes before it computed once."""
    student, teacher, labels = inputs
    logit_map = LogitMap(1.0, cap)
    if name == "sparse":
        return sparse_gradient(setting, backend, student, labels, temperature, logit_map)
    kernels, scratch = row_kernels(backend, setting.device), {"scratch": Scratch.of(student)}
    ones = torch.ones(len(student), dtype=torch.float64, device=setting.device)
    weights = RowWeights(kd=ones, ce=0.5 * ones, labels=labels, softmax=0.5 * ones)
    spec = divergence_spec("forward_kl" if name == "cross_entropy" else name, temperature=temperature)
    pair, grad = {"spec": spec, **scratch}, {"logit_map": logit_map}
    stats = kernels.pair_stats(copy_of(setting, student), copy_of(setting, teacher), labels, **pair)
    totals = kernels.merge_pair_stats(stats[None], spec, student.shape[1])

    def cross_entropy(s: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        return kernels.row_grad(s, totals.student, weights, operand_dtype=dtype, **grad, **scratch)

    def divergence(s: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        known = totals
        if spec.row.two_rounds:  # torch leaves in the teacher's slab what its gradient reads
            known = replace(totals, z=kernels.pair_round2(s, t, totals, **pair)[:, 0])
        return kernels.pair_grad(s, t, known, weights, operand_dtype=dtype, **pair, **grad)[1]

    return cross_entropy if name == "cross_entropy" else divergence


def sparse_gradient(
    setting: Setting, backend: str, student: Tensor, labels: Tensor, temperature: float, logit_map: LogitMap
) -> Gradient:
    """Gradient of a loss on a few ids.

    The factors are arbitrary, because only the rounding of the result is compared.
    """
    rows, columns = student.shape
    kernels, scratch = sparse_kernels(backend, setting.device, torch.float32), Scratch.of(student)
    ids = torch.rand(rows, columns, device=setting.device).topk(min(IDS, columns), dim=1).indices
    ids[:, -1] = -1  # one slot is empty
    ones = torch.ones(rows, dtype=torch.float64, device=setting.device)
    gradient = SparseGradient(
        peak=student.amax(1).double(),
        tail=0.7 * ones,
        softmax=0.3 * ones,
        ce=0.5 * ones,
        at_ids=torch.randn(ids.shape, device=setting.device).double(),
    )

    def sparse(s: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        kernels.sparse_stats(s, ids, labels, temperature, scratch)
        return kernels.sparse_grad(
            s, ids, labels, gradient, temperature, logit_map=logit_map, scratch=scratch, operand_dtype=dtype
        )

    return sparse
