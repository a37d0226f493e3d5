"""Which divergence may be computed from which kind of target.

exact: the value and gradient of the divergence itself. unbiased: exact in expectation. lower_bound: value and gradient
of the divergence between both distributions with all ids outside the record merged into one, which is never larger
(data processing inequality). biased: another quantity, allowed only by an explicit opt-in. refused: raises, with the
reason. docs/design/0007-sparse-loss.md derives each cell.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdtrain_kernels.divergences import DIVERGENCES

TARGETS = ("dense", "sampled", "top_k_tail", "top_k", "conditional", "label_log_prob", "score")
"""dense: teacher hidden states and head. sampled: ids whose weights estimate the teacher's distribution without bias.
top_k_tail: the probabilities of some ids and the total of all others. top_k: some ids without that total, renormalised
or not. conditional: ids of any of these records, both models renormalised on them. label_log_prob: the teacher's
log-probability of the data's own token. score: one number per sequence."""

F_DIVERGENCES = tuple(name for name, row in DIVERGENCES.items() if row.f_divergence)
"""Divergences of the form sum of q f(p / q) with convex f; merging ids never increases them."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Status of one divergence on one kind of target.

    kind: exact, unbiased, lower_bound, biased or refused; reason: why biased or refused, or empty.
    """

    kind: str
    reason: str = ""


_TOO_LITTLE = {
    "label_log_prob": "one probability per token does not determine a divergence between distributions",
    "score": "one number per sequence does not determine a divergence between distributions",
}
_LOGITS = "it compares logits, of which a sparse record has none"
_NO_F_DIVERGENCE = "it is not an f-divergence, so its value on some ids and a tail is not a bound"
_INFINITE = "it is infinite wherever the student gives probability to an id outside the record; keep the tail's mass"
_BIASED = {
    "sampled": "it is not linear in the weights, so sampling noise becomes bias",
    "top_k": "the teacher's probability outside the ids counts as 0, which trains the student towards 0 there",
    "conditional": "the student's probability outside the ids is unconstrained",
}


def _cell(divergence: str, target: str) -> Cell:
    if target in _TOO_LITTLE:
        return Cell("refused", _TOO_LITTLE[target])
    if target == "dense":
        return Cell("exact")
    row = DIVERGENCES[divergence]
    if not row.f_divergence:
        return Cell("refused", _LOGITS if row.uniform_baseline else _NO_F_DIVERGENCE)
    if target == "top_k_tail":
        return Cell("lower_bound")
    if row.infinite_at_zero and target in ("sampled", "top_k"):
        return Cell("refused", _INFINITE)
    if (divergence, target) == ("forward_kl", "sampled"):
        return Cell("unbiased")
    return Cell("biased", _BIASED[target])


MATRIX: dict[tuple[str, str], Cell] = {(d, t): _cell(d, t) for d in DIVERGENCES for t in TARGETS}
"""(divergence, target) -> cell."""


def require(divergence: str, target: str, *, allow_biased: bool = False) -> Cell:
    """The cell, if it may be used.

    Raises ValueError for unknown names and, with the reason, for refused cells and, unless allowed, biased ones.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence = {divergence!r} is unknown; choose one of {', '.join(DIVERGENCES)}")
    if target not in TARGETS:
        raise ValueError(f"target = {target!r} is unknown; choose one of {', '.join(TARGETS)}")
    cell = MATRIX[divergence, target]
    if cell.kind == "refused":
        raise ValueError(f"divergence = {divergence!r} on target = {target!r} is refused: {cell.reason}")
    if cell.kind == "biased" and not allow_biased:
        raise ValueError(
            f"divergence = {divergence!r} on target = {target!r} is biased: {cell.reason}; "
            "allow_biased=True accepts that"
        )
    return cell
