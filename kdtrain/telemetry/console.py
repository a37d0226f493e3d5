"""Console output: one line per report that grep can search, and tables. The only place with the order of columns.

`name value` pairs two spaces apart, always in the same order, units in `metrics.UNITS`; SI prefixes only for rates.
Lines are plain text; `kdtrain.log` adds colours on a terminal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

LABEL_WIDTH = 8


def format_rate(value: float) -> str:
    """Three digits and an SI prefix: 88.1k, 1.25M, 412."""
    if not math.isfinite(value):
        return str(value)
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.95 of one prefix would print as 1000, so it takes the next
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:#.3g}".rstrip(".") + prefix
    return f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """8s, 4m05s, 33h39m; a dash when unknown."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _gib(value: float) -> str:
    return f"{value:.1f}G" if value >= 1 else f"{value:.2f}G"


STEP_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss/total", "loss", _fixed(4)),
    ("loss/kd", "kd", _fixed(4)),
    ("loss/ce", "ce", _fixed(4)),
    ("distill/forward_kl", "kl", _fixed(4)),
    ("distill/gap", "gap", _fixed(4)),
    ("distill/top1_agreement", "top1", _percent),
    ("optim/grad_norm", "gnorm", "{:.3g}".format),
    ("optim/lr", "lr", "{:.2e}".format),
    ("throughput/tokens_per_s", "tok/s", format_rate),
    ("throughput/mfu", "mfu", _percent),
    ("memory/peak_allocated_gib", "mem", _gib),
    ("memory/host_gib", "rss", _gib),
    ("time/eta_s", "eta", format_duration),
)
"""Metric name, its short name on the line, its format."""

EVAL_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("eval/val_nll", "val_nll", _fixed(4)),
    ("eval/perplexity", "ppl", "{:.4g}".format),
    ("eval/kl_to_teacher", "kl_to_teacher", _fixed(4)),
    ("eval/teacher_nll", "teacher_nll", _fixed(4)),
    ("eval/top1_agreement", "top1", _percent),
    ("eval/overlap", "overlap", _percent),
    ("time/eval_s", "took", format_duration),
)


def format_line(label: str, pairs: Sequence[tuple[str, str]]) -> str:
    """`label`, padded, then `name value` pairs two spaces apart."""
    return "  ".join(
        [f"{label:<{LABEL_WIDTH}}".rstrip() if not pairs else f"{label:<{LABEL_WIDTH - 2}}"]
        + [f"{name} {value}" for name, value in pairs]
    )


def format_step(record: Mapping[str, float], last_step: int | None = None) -> str:
    """The line of one report: `step    10/480  loss 10.4410  kd 9.9312 ...`.

    `record` holds `data/step` and metrics by name; metrics without a column and columns without a metric are left out.
    On CUDA the memory shown is the device's (mem), else the process's (rss).
    """
    shown = dict(record)
    if "memory/peak_allocated_gib" in shown:
        shown.pop("memory/host_gib", None)
    step, width = int(record["data/step"]), len(str(last_step or 0))
    label = f"step  {step:>{width}}" + ("" if last_step is None else f"/{last_step}")
    return format_line(label, _pairs(shown, STEP_COLUMNS))


def format_eval(record: Mapping[str, float], last_step: int | None = None) -> str:
    """The line of one evaluation: `eval   500/480  val_nll 4.8120  kl_to_teacher 1.9033 ...`."""
    width = len(str(last_step or 0))
    label = f"eval  {int(record['data/step']):>{width}}" + ("" if last_step is None else f"/{last_step}")
    return format_line(label, _pairs(record, EVAL_COLUMNS))


def _pairs(
    record: Mapping[str, float], columns: tuple[tuple[str, str, Callable[[float], str]], ...]
) -> list[tuple[str, str]]:
    return [(short, write(record[name])) for name, short, write in columns if name in record]


def format_table(rows: Sequence[Mapping[str, object]], *, title: str | None = None) -> str:
    """An aligned table of rows with the same keys, under a header of these keys.

    Text is aligned left, numbers right; floats get four decimals, None a dash. Raises ValueError without rows and for
    rows with different keys.
    """
    if not rows:
        raise ValueError("a table needs at least one row")
    names = list(rows[0])
    for row in rows:
        if list(row) != names:
            raise ValueError(f"rows of a table differ: {names} and {list(row)}")
    cells = [[_cell(row[name]) for name in names] for row in rows]
    numeric = [all(row[name] is None or isinstance(row[name], int | float) for row in rows) for name in names]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]

    def write(line: Sequence[str]) -> str:
        parts = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip()

    lines = [] if title is None else [title]
    return "\n".join([*lines, write(names), write(["-" * w for w in widths]), *(write(line) for line in cells)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
