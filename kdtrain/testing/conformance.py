"""Measure value and gradient of a distillation loss on a vocabulary sharded over tensor-parallel ranks.

    python -m kdtrain.testing.conformance proofs/conformance_subjects.py --write docs/results/conformance.md

The value of a loss can be exact at any tp while its gradient is tp times too long or has a wrong direction, which a
comparison of losses does not show. `check` runs any loss, of logits or of hidden states and heads, on gloo ranks at
every tp and compares value, length and direction of each gradient with float64 autograd on the whole problem. Several
losses are declared in a subjects file: a Python file with `SUBJECTS`, a list of `Subject`.

Shape letters: T tokens, V vocabulary, v = V / tp columns or rows of this rank, D and E widths of student and teacher.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdtrain.distributed.collectives import gather_ranks
from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import reference
from kdtrain.testing.ranks import RankPool, load_file

TOKENS, VOCAB, WIDTH_S, WIDTH_T = 24, 96, 16, 24
TP_SIZES = (1, 2, 4)
TOLERANCE = 1e-4
"""Largest deviation from float64, in value, length and direction, of a float32 loss that counts as right."""


@dataclass(frozen=True, slots=True)
class Mode:
    """One divergence at one temperature. parameters: further arguments (teacher_share, top_k, ...), by name."""

    divergence: str
    temperature: float = 1.0
    parameters: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        extra = "".join(f" {name}={value}" for name, value in self.parameters.items())
        return f"{self.divergence} tau={self.temperature:g}{extra}"


DENSE_MODES = tuple(
    Mode(name, temperature) for name in ("forward_kl", "reverse_kl", "jsd") for temperature in (1.0, 2.0)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A loss and its declared properties.

    loss       on="logits": loss(student [T, v], teacher [T, v], labels [T], *, group, shard, divergence, temperature,
               **parameters) -> 0-d; on="hidden": the same after (hidden_s [T, D], head_s [v, D], hidden_t [T, E],
               head_t [v, E], labels). A function of a module or script that can be loaded again by its path
    reduction  "sum" or "mean" over tokens
    value      "replicated": every rank returns the whole loss; "partial": ranks return parts that add up to it
               and each calls backward on its own
    temperature_squared   whether the loss carries the factor temperature^2
    expected   expected(student [T, V], teacher [T, V], labels [T], divergence=, temperature=, **parameters) -> [T] in
               float64, the loss per token as the subject defines it; default: `dense_loss`, kdtrain's definitions
    needs      required modules; if one cannot be imported, the subject is reported as absent
    packages   packages whose versions are reported
    """

    name: str
    loss: Callable[..., Tensor]
    on: str = "logits"
    modes: Sequence[Mode] = DENSE_MODES
    reduction: str = "sum"
    value: str = "replicated"
    temperature_squared: bool = True
    expected: Callable[..., Tensor] | None = None
    needs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        allowed = {
            "on": ("logits", "hidden"),
            "reduction": ("sum", "mean"),
            "value": ("replicated", "partial"),
        }
        for argument, choices in allowed.items():
            if getattr(self, argument) not in choices:
                raise ValueError(f"{argument} = {getattr(self, argument)!r}, need one of {', '.join(choices)}")

    def absent(self) -> str:
        """Why it cannot run here, in one line; empty if it can."""
        for name in self.needs:
            try:
                importlib.import_module(name)
            except ImportError as error:
                return " ".join(f"{type(error).__name__}: {error}".split())
        return ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One subject in one mode at one tp against float64; the worst rank's numbers.

    gradient: of which argument. loss_error: relative. norm_ratio: measured / expected length, 1 is right; tp or 1 / tp
    indicates an extra or a missing reduction. cosine: between measured and expected.
    """

    subject: str
    mode: str
    tp: int
    gradient: str
    loss_error: float
    norm_ratio: float
    cosine: float

    @property
    def verdict(self) -> str:
        """right, or the first error."""
        if not self.loss_error <= TOLERANCE:
            return "wrong value"
        if not self.cosine >= 1 - TOLERANCE:
            return "wrong direction"
        factors = {"right": 1.0, f"{self.tp} times too long": self.tp, f"{self.tp} times too short": 1 / self.tp}
        for text, ratio in factors.items():
            if abs(self.norm_ratio - ratio) <= TOLERANCE * ratio:
                return text
        return "wrong length"


def dense_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, divergence: str, temperature: float, **parameters: Any
) -> Tensor:
    """kdtrain's definitions [T]: a divergence of `losses.reference`, or cross_entropy (labels, no temperature)."""
    if divergence == "cross_entropy":
        return reference.cross_entropy(student, labels)
    if divergence not in reference.DIVERGENCES:
        raise ValueError(f"divergence = {divergence!r} has no definition here; declare the subject's `expected`")
    return reference.DIVERGENCES[divergence](student, teacher, temperature=temperature, **parameters)


def check(
    loss: Callable[..., Tensor],
    *,
    tp: Sequence[int] = TP_SIZES,
    pool: Callable[[int], RankPool] | None = None,
    dtype: torch.dtype = torch.float32,
    **declared: Any,
) -> list[Finding]:
    """Findings of one loss for every mode, tp and gradient, in that order.

    declared: fields of `Subject` (on, modes, reduction, ...). pool: pools of ranks to run on, by size; without it,
    new ones are started and ended. Raises AssertionError with the traceback of a rank on which the loss fails.
    """
    subject = Subject(loss=loss, **{"name": getattr(loss, "__name__", "loss"), **declared})
    return run_subject(subject, tp=tp, pool=pool or RankPool, dtype=dtype, keep=pool is not None)


def run_subject(
    subject: Subject, *, tp: Sequence[int], pool: Callable[[int], RankPool], dtype: torch.dtype, keep: bool
) -> list[Finding]:
    """`check` of a declared subject. keep: leave the pools running."""
    for size in tp:
        if VOCAB % size:
            raise ValueError(f"tp = {size}, need a divisor of the vocabulary's {VOCAB} ids")
    findings = []
    for size in tp:
        ranks = pool(size)
        try:
            per_rank = ranks.run(_measure, subject=_portable(subject), dtype=str(dtype).removeprefix("torch."))
        finally:
            if not keep:
                ranks.close()
        for rows in zip(*per_rank, strict=True):
            findings.append(_worst(subject, size, rows))
    return sorted(findings, key=lambda f: [str(mode) for mode in subject.modes].index(f.mode))


def _portable(subject: Subject) -> dict[str, Any]:
    """The subject without functions and classes, which the ranks load again from their files."""
    plain = {name: getattr(subject, name) for name in ("on", "reduction", "value", "temperature_squared")}
    for name in ("loss", "expected"):
        function = getattr(subject, name) or dense_loss
        plain[name] = (sys.modules[function.__module__].__file__, function.__name__)
    return {**plain, "modes": [asdict(mode) for mode in subject.modes]}


def _measure(rank: int, world_size: int, *, subject: dict[str, Any], dtype: str) -> list[dict[str, Any]]:
    """One row per mode and gradient, on one rank. Communicates what the loss does, and gathers gradients."""
    loss_of, expected_of = (getattr(load_file(path), name) for path, name in (subject["loss"], subject["expected"]))
    rows = []
    for mode in subject["modes"]:
        tensors = problem(subject["on"], getattr(torch, dtype))
        arguments = {"divergence": mode["divergence"], "temperature": mode["temperature"], **mode["parameters"]}
        expected, gradients = _reference(tensors, subject, expected_of, arguments)
        shard = VocabShard.of(VOCAB, rank, world_size, multiple=1)
        mine = {name: _local(name, whole, shard) for name, whole in tensors.items()}
        loss = loss_of(*mine.values(), group=dist.group.WORLD, shard=shard, **arguments)
        torch.autograd.backward(loss)
        # A "partial" loss is the sum of the values of all ranks.
        value = gather_ranks(loss.detach().double(), dist.group.WORLD).sum() if subject["value"] == "partial" else loss
        error = float((value.detach() - expected).abs() / expected.abs())
        for name, whole in gradients.items():
            got = _whole_gradient(name, mine[name], dist.group.WORLD)
            rows.append(
                {
                    "mode": str(Mode(**mode)),
                    "gradient": name,
                    "loss_error": error,
                    "norm_ratio": float(got.norm() / whole.norm()),
                    "cosine": float((got * whole).sum() / (got.norm() * whole.norm())),
                }
            )
    return rows


def problem(on: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole problem, the same on every rank: both models' logits or hidden states and heads, and labels.

    Divergences are of the order of a nat.
    """
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    hidden_s, hidden_t = normal(TOKENS, WIDTH_S), normal(TOKENS, WIDTH_T)
    head_s, head_t = normal(VOCAB, WIDTH_S) * 1.5 / WIDTH_S**0.5, normal(VOCAB, WIDTH_T) * 1.5 / WIDTH_T**0.5
    labels = torch.randint(VOCAB, (TOKENS,), generator=rng)
    if on == "logits":
        tensors = {"student": hidden_s @ head_s.T, "teacher": hidden_t @ head_t.T}
    else:
        tensors = {"hidden_s": hidden_s, "head_s": head_s, "hidden_t": hidden_t, "head_t": head_t}
    return {**{name: tensor.to(dtype) for name, tensor in tensors.items()}, "labels": labels}


_STUDENT = ("student", "hidden_s", "head_s")
"""Arguments whose gradients are compared."""


def _local(name: str, whole: Tensor, shard: VocabShard) -> Tensor:
    """This rank's part: columns of logits, rows of heads, everything else whole; the student's as leaves."""
    rows = slice(shard.start, shard.stop)
    if name in ("student", "teacher"):
        whole = whole[:, rows]
    elif name.startswith("head"):
        whole = whole[rows]
    return whole.clone().requires_grad_(name in _STUDENT)


def _whole_gradient(name: str, leaf: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A leaf's gradient over the whole vocabulary, float64; for hidden states (replicated) this rank's."""
    if leaf.grad is None:
        raise ValueError(f"the loss gave {name} no gradient")
    gradient = leaf.grad.double()
    if name == "hidden_s":
        return gradient
    # Each rank has the gradient of its own columns or rows.
    return torch.cat(list(gather_ranks(gradient, group)), dim=1 if name == "student" else 0)


def _reference(
    tensors: dict[str, Tensor], subject: dict[str, Any], expected_of: Callable[..., Tensor], arguments: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients of the student's tensors) by autograd in float64 on the whole problem."""
    leaves = {name: tensors[name].double().clone().requires_grad_() for name in _STUDENT if name in tensors}
    if subject["on"] == "logits":
        student, teacher = leaves["student"], tensors["teacher"].double()
    else:
        student = leaves["hidden_s"] @ leaves["head_s"].T
        teacher = tensors["hidden_t"].double() @ tensors["head_t"].double().T
    per_token = expected_of(student, teacher, tensors["labels"], **arguments)
    loss = per_token.mean() if subject["reduction"] == "mean" else per_token.sum()
    if subject["temperature_squared"]:
        loss = loss * arguments["temperature"] ** 2
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def _worst(subject: Subject, tp: int, rows: Sequence[dict[str, Any]]) -> Finding:
    """One finding from every rank's row of the same mode and gradient."""
    off = max(rows, key=lambda row: abs(row["norm_ratio"] - 1))
    return Finding(
        subject.name,
        rows[0]["mode"],
        tp,
        rows[0]["gradient"],
        max(row["loss_error"] for row in rows),
        off["norm_ratio"],
        min(row["cosine"] for row in rows),
    )


def table(findings: Sequence[Finding]) -> str:
    """Markdown, one line per subject, mode and gradient; tp side by side."""
    sizes = sorted({finding.tp for finding in findings})
    grouped: dict[tuple[str, str, str], dict[int, Finding]] = {}
    for finding in findings:
        grouped.setdefault((finding.subject, finding.mode, finding.gradient), {})[finding.tp] = finding
    at = " / ".join(map(str, sizes))
    lines = [
        f"| loss | mode | gradient of | worst loss error | norm ratio, tp {at} | worst cosine | verdict |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for (subject, mode, gradient), by_tp in grouped.items():
        found = [by_tp[size] for size in sizes if size in by_tp]
        wrong = [f"{finding.verdict} at tp {finding.tp}" for finding in found if finding.verdict != "right"]
        lines.append(
            f"| {subject} | {mode} | {gradient} | {max(f.loss_error for f in found):.1e} "
            f"| {' / '.join(f'{f.norm_ratio:.4f}' for f in found)} | {min(f.cosine for f in found):.6f} "
            f"| {'; '.join(wrong) or 'right'} |"
        )
    return "\n".join(lines) + "\n"


def report(subjects: Sequence[Subject], source: str, command: str) -> tuple[str, list[Finding]]:
    """The document of a subjects file, and its findings. Absent subjects are listed with the reason."""
    pools: dict[int, RankPool] = {}
    findings, absent, packages = [], [], {"torch"}
    try:
        for subject in subjects:
            if reason := subject.absent():
                absent.append(f"- {subject.name}: {reason}")
                continue
            packages.update(subject.packages)
            findings += run_subject(
                subject,
                tp=TP_SIZES,
                pool=lambda size: pools.setdefault(size, RankPool(size)),
                dtype=torch.float32,
                keep=True,
            )
    finally:
        for pool in pools.values():
            pool.close()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(packages))
    head = f"""# Losses on a sharded vocabulary against float64

Made by `{command}`;
`kdtrain/testing/conformance.py` explains the columns, the losses are defined in `{source}`.
float32 on gloo ranks, {TOKENS} tokens, {VOCAB} ids, {versions}.
Right: within {TOLERANCE:g} in value, length and direction. Gradients are those of the loss as its package returns it;
factors that a trainer applies to it are not included.
"""
    listed = "\nAbsent where this was made:\n\n" + "\n".join(absent) + "\n" if absent else ""
    return f"{head}\n{table(findings)}{listed}", findings


def main() -> None:
    """Run a subjects file, print its table and, with --write, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", type=Path, help="Python file with SUBJECTS")
    parser.add_argument("--write", type=Path, metavar="FILE.md")
    arguments = parser.parse_args()
    command = f"python -m kdtrain.testing.conformance {arguments.subjects}"
    command += f" --write {arguments.write}" if arguments.write else ""
    text, _ = report(load_file(arguments.subjects).SUBJECTS, str(arguments.subjects), command)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
