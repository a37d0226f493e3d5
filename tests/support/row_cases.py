"""Slabs, logits and comparisons for tests of row kernels."""

from __future__ import annotations

import torch
from kdtrain_kernels.torch_rows import RowWeights
from torch import Tensor

ROW_LABELS = torch.tensor([0, -1, 2, 5, -1])
"""Label columns of a case's five rows; those past the last column become -1 (`labels_of`)."""


def slab_of(values: Tensor) -> Tensor:
    """[C, n] with a row stride that is a multiple of 128 and NaN in the gap, which must not be used."""
    columns = values.shape[1]
    memory = torch.full((values.shape[0], max(1, -(-columns // 128)) * 128), torch.nan)
    memory[:, :columns] = values
    return memory[:, :columns]


def logits_of(columns: int, *, masked: bool = False, cap: float | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Both models' logits of five rows: close, far apart, and with columns masked in both or only in the teacher."""
    rng = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(len(ROW_LABELS), columns, generator=rng)
    teacher = student + torch.tensor([0.01, 1.0, 1.0, 3.0, 1.0])[:, None] * torch.randn(student.shape, generator=rng)
    if cap is not None:
        student = cap * torch.tanh(student / cap)
    if masked and columns > 1:
        for logits in (student, teacher):
            logits[:, columns // 2] = -torch.inf
            logits[3, 1:] = -torch.inf
        teacher[4, -1] = -1e9
    return student, teacher + 20.0


def weights_of(labels: Tensor) -> RowWeights:
    """Weights of five rows: without divergence, without cross-entropy, with both, and with z-loss."""
    kd = torch.tensor([1.0, 0.0, 0.7, 2.0, 0.5], dtype=torch.float64)
    ce = torch.tensor([0.0, 1.0, 0.6, 1.5, 0.5], dtype=torch.float64)
    return RowWeights(kd, ce, labels, ce + torch.tensor([0.0, 0.0, 0.1, 0.0, 0.2], dtype=torch.float64))


def labels_of(columns: int) -> Tensor:
    """ROW_LABELS, -1 where there is no such column."""
    return torch.where(columns > ROW_LABELS, ROW_LABELS, -1)


def assert_rows_close(got: Tensor, expected: Tensor, tolerance: float = 1e-6, floor: float = 1.0) -> None:
    """Assert per row that |got - expected| <= tolerance times the row's largest number, at least `floor`."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    got, expected = got.double().reshape(len(got), -1), expected.double().reshape(len(got), -1)
    torch.testing.assert_close(*(x.where(~x.isfinite(), 0.0) for x in (got, expected)), equal_nan=True)
    gap = (got - expected).where(got.isfinite(), 0.0).abs()
    size = expected.where(expected.isfinite(), 0.0).abs()
    if gap.shape[1]:
        assert (gap.amax(1) <= tolerance * size.amax(1).clamp(min=floor)).all(), (gap.amax(1), size.amax(1))


def truncated_to_bfloat16(values: Tensor) -> Tensor:
    """bfloat16 by truncation: the interpreter rounds toward 0, devices round to nearest."""
    return (values.contiguous().view(torch.int32) & -65536).view(torch.float32).bfloat16()
