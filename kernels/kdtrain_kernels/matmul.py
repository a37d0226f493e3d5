"""Matrix products that accumulate in float32 (float64 for float64 inputs) whatever the inputs' dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: the dtype of logits, statistics and gradients."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def as_operand(tensor: Tensor, work: torch.dtype) -> Tensor:
    """`tensor` as `matmul_into` wants it: half precision stays on CUDA, where products of it accumulate in float32;
    elsewhere it is upcast once."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor if half and tensor.is_cuda and work == torch.float32 else tensor.to(work)


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out = a @ b. out [M, N] float32 or float64; a [M, K], b [K, N] both of out's dtype, or half precision on CUDA."""
    if a.dtype != out.dtype:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out=out)


def add_matmul_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b, accumulated in total's dtype. Shapes and dtypes as `matmul_into`."""
    if a.dtype != total.dtype:
        return total.add_(torch.mm(a, b, out_dtype=total.dtype))
    return total.addmm_(a, b)
