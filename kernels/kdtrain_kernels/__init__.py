"""Row kernels for streamed losses in torch and Triton; no configuration, no process group."""

import torch

from kdtrain_kernels.dispatch import BACKENDS, row_kernels
from kdtrain_kernels.divergences import DIVERGENCES, DivergenceSpec, divergence_spec
from kdtrain_kernels.versions import torch_problem

__all__ = ["BACKENDS", "DIVERGENCES", "DivergenceSpec", "divergence_spec", "row_kernels"]


def _require_torch(version: str) -> None:
    """Raises ImportError for a release of torch that is too old."""
    if problem := torch_problem(version):
        raise ImportError(problem)


def _settle_vector_maths() -> None:
    """Call each elementary function once, on few elements and therefore in one thread.

    The first call of such a function in a process may race between threads and return low-accuracy results to one of
    them (pytorch/pytorch issue 188792, vector maths on CPUs). Losses would then differ from run to run in the sixth
    digit.
    """
    for dtype in (torch.float32, torch.float64):
        few = torch.full((8,), 0.5, dtype=dtype)
        for function in (torch.exp, torch.expm1, torch.log, torch.log1p, torch.tanh):
            function(few)


_require_torch(torch.__version__)
_settle_vector_maths()
