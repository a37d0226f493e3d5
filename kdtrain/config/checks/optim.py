"""Checks of section optim."""

from __future__ import annotations

import math

from kdtrain.config.checks.report import Report
from kdtrain.config.schema import OptimSection


def check_optim(o: OptimSection, report: Report) -> None:
    """Ranges of AdamW's settings and of the clipping norm."""
    report.positive("optim.lr", "3e-4 is usual")
    if not all(0 <= beta < 1 for beta in o.betas):
        report.add("optim.betas", "are not both in [0, 1)", "[0.9, 0.95] is usual", value=list(o.betas))
    if not 0 < o.eps < 1:
        report.add("optim.eps", "is not in (0, 1)", "1e-8 is usual")
    if not 0 <= o.weight_decay < math.inf:
        report.add("optim.weight_decay", "is not 0 or more", "0.1 is usual, 0 switches it off")
    elif o.weight_decay * o.lr >= 1:  # AdamW multiplies weights with 1 - lr * weight_decay
        report.add("optim.weight_decay", f"times optim.lr = {o.lr} is 1 or more", "0.1 is usual")
    report.positive("optim.grad_clip", "1.0 is usual, null: no clipping")
