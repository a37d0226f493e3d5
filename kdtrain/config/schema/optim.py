"""Section optim: AdamW."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class OptimSection:
    """AdamW."""

    lr: float = 3.0e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    eps: float = 1.0e-8
    """AdamW epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; norms, biases and other vectors get none."""
    grad_clip: float | None = 1.0
    """Largest global gradient norm. null: no clipping."""
