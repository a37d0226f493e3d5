"""The table that `architectures.py` writes: a row for each model type."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import measuring as common
from architecture_documents import NOT_MEASURED, Apart

EQUAL, REFUSED, FAILED = "equal", "refused", "FAILED"
TOLERANCE = 1e-5
UNKNOWN = Apart(NOT_MEASURED, "")


@dataclass(frozen=True, slots=True)
class Row:
    """One model type. planned: whether transformers gives it a tensor-parallel plan; None: no copy could be built.

    apart: what keeps its packed documents apart.
    """

    model_type: str
    name: str
    planned: bool | None
    result: str
    detail: str = ""
    error: float = math.nan
    apart: Apart = UNKNOWN

    def line(self) -> str:
        error = "" if math.isnan(self.error) else f"{self.error:.1e}"
        detail = "; ".join(text for text in (self.detail, self.apart.missing.replace("|", "/")) if text)
        return f"| {self.name} | {self.model_type} | {self.result} | {error} | {self.apart.names} | {detail} |"


NOTES = (
    "Result: `equal`, all errors within the tolerance; `refused`, kdtrain gives the reason at start-up;",
    "`FAILED`, neither. `mixture of experts` (as students; mixtures may be teachers), `refused at tp 1 too` (it looks",
    "ahead, or changes its logits in an unknown way) and `no tiny copy` (most often a model of several modalities with",
    "its text part listed on its own) say nothing about tensor parallelism. Error: the worst of hidden states, loss",
    "and every parameter's gradient, relative, in the 2-norm.",
    "",
    "Packed documents: the attention implementations that keep them apart, measured on a copy of the default config",
    "(`proofs/architecture_documents.py`); the detail has the reasons for the others. `flash` is flash-attention 2, 3",
    "and 4, where their package is installed; `none` is a class that runs with `data.reset_positions=false` only.",
)
SECTIONS = {
    "Dense, with a tensor-parallel plan in transformers": True,
    "Dense, without one: what is equal has a plan in `kdtrain/parallel/plans.py`": False,
    "Not measured": None,
}


def counts_of(rows: list[Row]) -> list[str]:
    """The sentences at the top."""
    planned = [row for row in rows if row.planned]
    equal = sum(row.result == EQUAL for row in planned)
    others = Counter(row.result for row in rows if not row.planned)
    every = ", ".join(f"{count} {result}" for result, count in sorted(others.items()))
    share = 100 * equal / max(len(planned), 1)
    return [
        f"**{equal} of {len(planned)} dense classes with a plan are equal ({share:.0f} %)**, tolerance {TOLERANCE:g}.",
        f"The other {len(rows) - len(planned)} of all {len(rows)}: {every}.",
    ]


def table_of(rows: list[Row], command: str) -> str:
    """Markdown."""
    import torch
    import transformers

    lines = [
        "# Architectures over two tensor-parallel ranks against the stock model",
        "",
        f"Made by `{command}` (`proofs/architectures.py`, which describes the measurement).",
        f"{common.today()}, torch {torch.__version__}, transformers {transformers.__version__}, gloo on a CPU.",
        "",
        *counts_of(rows),
        "",
        *NOTES,
    ]
    for title, planned in SECTIONS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| class | model_type | result | error | packed documents | detail |",
            "| --- | --- | --- | ---: | --- | --- |",
        ]
        lines += [row.line() for row in rows if row.planned is planned]
    return "\n".join([*lines, ""])
