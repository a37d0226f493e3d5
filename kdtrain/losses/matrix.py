"""Which divergence may be computed from which kind of target, declared in one place.

exact: the value and gradient of the divergence itself. refused: raises, with the reason. A cell that is not exact is
never entered silently.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdtrain.losses.reference import DIVERGENCES

TARGETS = ("dense", "sparse", "label_log_prob", "score")
"""dense: teacher hidden states and head. sparse: some ids with weights. label_log_prob: the teacher's log-probability
of the data's own token. score: one number per sequence."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one divergence is worth on one kind of target. kind: exact or refused; reason: why refused, or empty."""

    kind: str
    reason: str = ""


_NEEDS_MORE = {
    "sparse": "this version has no loss on sparse targets; use the teacher's hidden states",
    "label_log_prob": "one probability per token does not determine a divergence between distributions",
    "score": "one number per sequence does not determine a divergence between distributions",
}

MATRIX: dict[tuple[str, str], Cell] = {
    (divergence, target): Cell("refused", _NEEDS_MORE[target]) if target in _NEEDS_MORE else Cell("exact")
    for divergence in DIVERGENCES
    for target in TARGETS
}
"""(divergence, target) -> cell."""


def require(divergence: str, target: str) -> Cell:
    """The cell, if it may be used. Raises ValueError for unknown names and, with the reason, for refused cells."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence = {divergence!r} is unknown; choose one of {', '.join(DIVERGENCES)}")
    if target not in TARGETS:
        raise ValueError(f"target = {target!r} is unknown; choose one of {', '.join(TARGETS)}")
    cell = MATRIX[divergence, target]
    if cell.kind == "refused":
        raise ValueError(f"divergence = {divergence!r} on target = {target!r} is refused: {cell.reason}")
    return cell
