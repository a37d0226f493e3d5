"""`kdtrain_kernels.torch_rows` on a GPU: the same names, arguments and meaning, one kernel launch each.

Differences: slabs are float32, with a row stride that is a multiple of 128 elements and rows that start 16-byte aligned
(ValueError otherwise), and the gap between the columns and the stride is overwritten; scratch is not used; pair_round2
leaves the teacher's slab unchanged, and pair_grad recomputes the slope, because reading it would cost as much as
reading the logits. Nothing communicates or synchronises the device. Runs on CPUs if TRITON_INTERPRET=1 is set before
the import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdtrain_kernels.blocks import Scratch, front_of_rows
from kdtrain_kernels.dispatch import TRITON_DIVERGENCES
from kdtrain_kernels.divergences import DivergenceSpec
from kdtrain_kernels.torch_rows import (
    PAIR_STATS,
    ROW_STATS,
    LogitMap,
    PairTotals,
    RowTotals,
    RowWeights,
    merge_pair_stats,
    merge_stats,
)
from kdtrain_kernels.triton import kernels
from kdtrain_kernels.triton.device import launch, rounding

__all__ = [
    "first_argmax",
    "merge_pair_stats",
    "merge_stats",
    "pair_grad",
    "pair_measure",
    "pair_round2",
    "pair_stats",
    "pair_value",
    "row_grad",
    "row_stats",
]

ROW_MULTIPLE = 128
"""The row stride in elements is a multiple of this."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Columns of a block and warps of a program."""

    block: int
    warps: int


LAUNCHES = {
    **dict.fromkeys(("stats", "max"), Launch(4096, 8)),
    **dict.fromkeys(("coupling", "sums", "row_grad", "pair_grad"), Launch(2048, 8)),
    "measure": Launch(1024, 4),
}
"""How each kernel is launched: a thread's columns, 8 or 16, stay in registers on every target, and several programs
fit a multiprocessor (docs/results/triton_sass.md)."""


def row_stats(slab: Tensor, labels: Tensor, temperature: float, scratch: Scratch) -> Tensor:
    """[C, ROW_STATS] float64, as in `torch_rows`."""
    stats = torch.empty(slab.shape[0], ROW_STATS, dtype=torch.float64, device=slab.device)
    _stats_into(stats, slab, labels, temperature)
    return stats


def pair_stats(student: Tensor, teacher: Tensor, labels: Tensor, *, spec: DivergenceSpec, scratch: Scratch) -> Tensor:
    """[C, PAIR_STATS] float64, as in `torch_rows`; for reverse_kl both slabs are read twice."""
    temperature = spec.temperature
    stats = torch.zeros(student.shape[0], PAIR_STATS, dtype=torch.float64, device=student.device)
    _stats_into(stats, student, labels, temperature)
    _stats_into(stats[:, ROW_STATS:], teacher, labels, temperature)
    if spec.kernel == "reverse_kl":
        pair, flags = _pair_arguments(student, teacher, temperature)
        _launch(kernels.coupling_kernel, "coupling", student, *pair, stats, stats.stride(0), 1.0 / temperature, **flags)
    return stats


def row_grad(
    slab: Tensor,
    totals: RowTotals,
    weights: RowWeights,
    *,
    logit_map: LogitMap,
    scratch: Scratch,
    operand_dtype: torch.dtype,
) -> Tensor:
    """d loss / d product [C, n], as in `torch_rows`."""
    operand = _operand(slab, operand_dtype)
    numbers = torch.stack([totals.peak, totals.log_sum_1, weights.ce, weights.softmax])
    _launch(
        kernels.row_grad_kernel,
        "row_grad",
        slab,
        slab,
        operand,
        slab.stride(0),
        operand.stride(0),
        slab.shape[1],
        numbers,
        weights.labels,
        *_chain(logit_map),
        **_chain_flags(logit_map),
        **_rounding(slab, operand, "row_grad"),
    )
    return operand


def pair_round2(
    student: Tensor, teacher: Tensor, totals: PairTotals, *, spec: DivergenceSpec, scratch: Scratch
) -> Tensor:
    """[C, 2] float64: this rank's partial sums of Z and of D, as in `torch_rows`."""
    temperature = spec.temperature
    out = torch.zeros(student.shape[0], 2, dtype=torch.float64, device=student.device)
    pair, flags = _pair_arguments(student, teacher, temperature)
    numbers = torch.stack(_pair_numbers(totals, temperature))
    _launch(
        kernels.pair_sums_kernel,
        "sums",
        student,
        *pair,
        numbers,
        out,
        1.0 / temperature,
        1.0 / totals.vocab_size,
        **flags,
        **parameters(spec),
    )
    return out


def pair_value(
    student: Tensor, teacher: Tensor, totals: PairTotals, *, spec: DivergenceSpec, scratch: Scratch
) -> Tensor:
    """[C] float64: this rank's partial sum of D, as in `torch_rows`."""
    return pair_round2(student, teacher, totals, spec=spec, scratch=scratch)[:, 1]


def pair_grad(
    student: Tensor,
    teacher: Tensor,
    totals: PairTotals,
    weights: RowWeights,
    *,
    spec: DivergenceSpec,
    logit_map: LogitMap,
    scratch: Scratch,
    operand_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(D's part [C] float64, d loss / d product [C, n]), as in `torch_rows`; the teacher's slab is only read."""
    temperature = spec.temperature
    operand = _operand(student, operand_dtype)
    value = torch.zeros(student.shape[0], dtype=torch.float64, device=student.device)
    numbers = torch.stack(
        [
            *_pair_numbers(totals, temperature),
            totals.student.log_sum_1,
            totals.z,
            weights.kd * temperature,  # dx/ds = 1 / temperature and the loss carries temperature^2
            weights.ce,
            weights.softmax,
        ]
    )
    (s, t, stride_s, stride_t, n), flags = _pair_arguments(student, teacher, temperature)
    _launch(
        kernels.pair_grad_kernel,
        "pair_grad",
        student,
        s,
        t,
        operand,
        stride_s,
        stride_t,
        operand.stride(0),
        n,
        numbers,
        weights.labels,
        value,
        1.0 / temperature,
        1.0 / totals.vocab_size,
        *_chain(logit_map),
        **flags,
        **_chain_flags(logit_map),
        **parameters(spec),
        **_rounding(s, operand, "pair_grad"),
        VALUED=not spec.row.two_rounds,
    )
    return value, operand


def pair_measure(
    student: Tensor, teacher: Tensor, totals: PairTotals, temperature: float, *, scratch: Scratch
) -> Tensor:
    """[C, 4] float64: partial sums for entropies, forward KL and total variation, as in `torch_rows`."""
    out = torch.zeros(student.shape[0], 4, dtype=torch.float64, device=student.device)
    pair, flags = _pair_arguments(student, teacher, temperature)
    numbers = [*_pair_numbers(totals, temperature), totals.student.log_sum_1, totals.teacher.log_sum_1]
    _launch(
        kernels.pair_measure_kernel, "measure", student, *pair, torch.stack(numbers), out, 1.0 / temperature, **flags
    )
    return out


def first_argmax(slab: Tensor, scratch: Scratch) -> Tensor:
    """[C, 2] float64: each row's largest logit and the smallest column that holds it, as in `torch_rows`."""
    out = torch.zeros(slab.shape[0], 2, dtype=torch.float64, device=slab.device)
    _check(slab)
    _launch(kernels.first_argmax_kernel, "max", slab, slab, slab.stride(0), slab.shape[1], out)
    return out


def parameters(spec: DivergenceSpec) -> dict[str, Any]:
    """The constexpr arguments of kernels that compute a divergence."""
    first, second, *_ = (*(spec[name] for name in TRITON_DIVERGENCES[spec.kernel]), 0.0, 0.0)
    return {"KIND": spec.kernel, "A": first, "B": second}


def _stats_into(out: Tensor, slab: Tensor, labels: Tensor, temperature: float) -> None:
    _check(slab)
    _launch(
        kernels.row_stats_kernel,
        "stats",
        slab,
        slab,
        slab.stride(0),
        slab.shape[1],
        labels,
        out,
        out.stride(0),
        1.0 / temperature,
        AT_ONE=temperature == 1.0,
    )


def _pair_arguments(student: Tensor, teacher: Tensor, temperature: float) -> tuple[tuple[Any, ...], dict[str, bool]]:
    _check(student)
    _check(teacher)
    arguments = student, teacher, student.stride(0), teacher.stride(0), student.shape[1]
    return arguments, {"AT_ONE": temperature == 1.0}


def _pair_numbers(totals: PairTotals, temperature: float) -> list[Tensor]:
    s, t = totals.student, totals.teacher
    sums = [s.log_sum_1, t.log_sum_1] if temperature == 1.0 else [s.log_sum, t.log_sum]
    return [s.peak, t.peak, *sums]


def _chain(logit_map: LogitMap) -> tuple[float, float]:
    return 1.0 / (logit_map.softcap or 1.0), logit_map.logit_scale


def _chain_flags(logit_map: LogitMap) -> dict[str, bool]:
    return {"CAPPED": logit_map.softcap is not None, "SCALED": logit_map.logit_scale != 1.0}


def _operand(slab: Tensor, dtype: torch.dtype) -> Tensor:
    _check(slab)
    return front_of_rows(slab, dtype)


def _rounding(slab: Tensor, operand: Tensor, name: str) -> dict[str, Any]:
    return rounding(slab, operand, LAUNCHES[name].block, LAUNCHES[name].warps)


def _launch(kernel: Any, name: str, slab: Tensor, *arguments: Any, **constants: Any) -> None:
    """One program for each of the slab's rows, on its device."""
    chosen = LAUNCHES[name]
    launch(kernel, slab, slab.shape[0], *arguments, warps=chosen.warps, BLOCK=chosen.block, **constants)


def _check(slab: Tensor) -> None:
    if slab.dtype != torch.float32:
        raise ValueError(f"a slab is {slab.dtype}, need float32 for the triton kernels; choose backend = torch")
    if slab.stride(0) % ROW_MULTIPLE or slab.stride(0) < slab.shape[1] or slab.data_ptr() % 16:
        raise ValueError(
            f"a slab of {slab.shape[1]} columns has rows {slab.stride(0)} elements apart from address "
            f"{slab.data_ptr()}, need a multiple of {ROW_MULTIPLE} that is not less and an address divisible by 16"
        )
