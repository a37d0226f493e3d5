"""The three matrix products of a language-model head, accumulated in float32 (float64 for float64 inputs).

C tokens of a chunk, D width, n rows of the head. bfloat16 operands on CUDA are multiplied directly into a float32
result (`out_dtype`); elsewhere lower precision is upcast a few head rows at a time, so that no full copy of the head
exists.

Float32 on a CPU with AVX-512 is multiplied by oneDNN, a panel of head rows at a time: torch.mm calls MKL, which reaches
half of oneDNN's rate on AMD's processors (docs/log.md). oneDNN has no output argument, so a panel's product is small
and is copied while it is in cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

UPCAST_ELEMENTS = 1 << 20
"""Elements of the head that are upcast at a time if the device cannot multiply its dtype into the result's."""

PANEL_ELEMENTS = 3 << 15
"""Elements of a panel of the head, and of a panel's product with a chunk, that oneDNN multiplies at a time."""

ONEDNN_ROWS = 1024
"""Heads of fewer rows are left to torch.mm: a call of oneDNN costs some 20 us. It does not depend on the number of
tokens, so that a token's logits do not."""


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: the dtype of logits and accumulated gradients."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def multiplies_directly(operand: Tensor, work: torch.dtype) -> bool:
    """Whether products of `operand`'s dtype with a `work` result need no upcast on its device."""
    return operand.dtype == torch.bfloat16 and operand.is_cuda and work == torch.float32


def uses_onednn(weight: Tensor, work: torch.dtype) -> bool:
    """Whether the products of a head [n, D] with a `work` result are multiplied by oneDNN."""
    return (
        weight.device.type == "cpu"
        and work == torch.float32
        and len(weight) >= ONEDNN_ROWS
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # the compiler's operation, not a documented one
    )


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """out [C, n] = hidden [C, D] @ weight[n, D].T; `out` has the working dtype."""
    if multiplies_directly(weight, out.dtype):
        return torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    hidden = hidden.to(out.dtype)
    if uses_onednn(weight, out.dtype):
        for rows in _panels(weight, len(hidden)):
            out[:, rows] = _onednn(hidden, weight[rows].to(out.dtype).contiguous())
        return out
    for rows, part in _upcast_rows(weight, out.dtype):
        torch.mm(hidden, part.T, out=out[:, rows])
    return out


def hidden_grad_into(out: Tensor, grad_logits: Tensor, weight: Tensor) -> Tensor:
    """out [C, D] = grad_logits [C, n] @ weight [n, D]; grad_logits in `operand_dtype`."""
    if multiplies_directly(weight, out.dtype):
        return torch.mm(grad_logits, weight, out_dtype=out.dtype, out=out)
    if uses_onednn(weight, out.dtype):
        out.zero_()
        for rows in _panels(weight, len(out)):
            out += _onednn(grad_logits[:, rows], weight[rows].to(out.dtype).contiguous().T)
        return out
    for first, (rows, part) in enumerate(_upcast_rows(weight, out.dtype)):
        out.addmm_(grad_logits[:, rows], part, beta=0 if first == 0 else 1)
    return out


def add_weight_grad_(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> Tensor:
    """total [n, D] += grad_logits[C, n].T @ hidden [C, D]; grad_logits in `operand_dtype`."""
    if multiplies_directly(hidden, total.dtype):
        return torch.addmm(total, grad_logits.T, hidden, out_dtype=total.dtype, out=total)
    hidden = hidden.to(total.dtype)
    if uses_onednn(total, total.dtype):
        columns = hidden.T.contiguous()
        for rows in _panels(total, len(hidden)):
            total[rows] += _onednn(grad_logits[:, rows].T, columns)
        return total
    return total.addmm_(grad_logits.T, hidden)


def operand_dtype(operand: Tensor, work: torch.dtype) -> torch.dtype:
    """The dtype in which d(logits), computed in `work`, is multiplied with `operand` (the head or hidden states)."""
    return operand.dtype if multiplies_directly(operand, work) else work


def _onednn(left: Tensor, right: Tensor) -> Tensor:
    """left [m, k] @ right[n, k].T as a new tensor. `right` or its transpose must be contiguous: other strides make
    oneDNN reorder it by its reference code, a thousand times slower."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return product


def _panels(weight: Tensor, tokens: int) -> Iterator[slice]:
    """Consecutive rows of a head [n, D], for products with `tokens` rows."""
    num_rows, width = weight.shape
    step = PANEL_ELEMENTS // max(width, tokens)
    step = max(1, step - step % 64 if step > 64 else step)  # whole vectors
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def _upcast_rows(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, weight[rows] in dtype), all rows at once if they have that dtype already."""
    num_rows, width = weight.shape
    step = num_rows if weight.dtype == dtype else max(1, UPCAST_ELEMENTS // max(1, width))
    for first in range(0, num_rows, max(1, step)):
        rows = slice(first, min(first + step, num_rows))
        yield rows, weight[rows].to(dtype)
