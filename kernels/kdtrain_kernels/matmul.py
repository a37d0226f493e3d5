"""The three matrix products of a language-model head, accumulated in float32 (float64 for float64 inputs).

C tokens of a chunk, D width, n rows of the head. bfloat16 operands on CUDA are multiplied directly into a float32
result (`out_dtype`); elsewhere lower precision is upcast a few head rows at a time, so that no full copy of the head
exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

UPCAST_ELEMENTS = 1 << 20
"""Elements of the head that are upcast at a time if the device cannot multiply its dtype into the result's."""


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: the dtype of logits and accumulated gradients."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def multiplies_directly(operand: Tensor, work: torch.dtype) -> bool:
    """Whether products of `operand`'s dtype with a `work` result need no upcast on its device."""
    return operand.dtype == torch.bfloat16 and operand.is_cuda and work == torch.float32


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """out [C, n] = hidden [C, D] @ weight[n, D].T; `out` has the working dtype."""
    if multiplies_directly(weight, out.dtype):
        return torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    hidden = hidden.to(out.dtype)
    for rows, part in _upcast_rows(weight, out.dtype):
        torch.mm(hidden, part.T, out=out[:, rows])
    return out


def hidden_grad_into(out: Tensor, grad_logits: Tensor, weight: Tensor) -> Tensor:
    """out [C, D] = grad_logits [C, n] @ weight [n, D]; grad_logits in `operand_dtype`."""
    if multiplies_directly(weight, out.dtype):
        return torch.mm(grad_logits, weight, out_dtype=out.dtype, out=out)
    for first, (rows, part) in enumerate(_upcast_rows(weight, out.dtype)):
        out.addmm_(grad_logits[:, rows], part, beta=0 if first == 0 else 1)
    return out


def add_weight_grad_(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> Tensor:
    """total [n, D] += grad_logits[C, n].T @ hidden [C, D]; grad_logits in `operand_dtype`."""
    if multiplies_directly(hidden, total.dtype):
        return torch.addmm(total, grad_logits.T, hidden, out_dtype=total.dtype, out=total)
    return total.addmm_(grad_logits.T, hidden.to(total.dtype))


def operand_dtype(operand: Tensor, work: torch.dtype) -> torch.dtype:
    """The dtype in which d(logits), computed in `work`, is multiplied with `operand` (the head or hidden states)."""
    return operand.dtype if multiplies_directly(operand, work) else work


def _upcast_rows(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, weight[rows] in dtype), all rows at once if they have that dtype already."""
    num_rows, width = weight.shape
    step = num_rows if weight.dtype == dtype else max(1, UPCAST_ELEMENTS // max(1, width))
    for first in range(0, num_rows, max(1, step)):
        rows = slice(first, min(first + step, num_rows))
        yield rows, weight[rows].to(dtype)
