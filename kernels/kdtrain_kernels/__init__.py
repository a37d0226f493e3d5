"""Row kernels for streamed losses: torch (and, where built, triton) only; no configuration, no process group."""

from kdtrain_kernels.dispatch import BACKENDS, row_kernels
from kdtrain_kernels.divergences import PLUG_INS, DivergenceSpec, divergence_spec

__all__ = ["BACKENDS", "PLUG_INS", "DivergenceSpec", "divergence_spec", "row_kernels"]
