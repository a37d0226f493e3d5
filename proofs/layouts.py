"""Every layout that fits 1, 2 and 4 gloo ranks, three optimizer steps each, against plain torch in one process.

    python proofs/layouts.py            # a few minutes -> docs/results/layouts.md, and prints it
    python proofs/layouts.py --match tp4     # only the layouts whose name contains it; writes nothing
    python proofs/layouts.py --device cuda --ranks 1 2   # a GPU per rank, NCCL -> docs/results/layouts_cuda.md

The steps are those of tests/support/layout_steps.py: whole logits, autograd and torch's AdamW on one side, kdtrain
under DeepSpeed on the other; eight sequences with 11, 0, 1, ... valid tokens, rates that change, active clipping,
weight decay. tests/distributed/test_engine_layouts.py tests a few layouts; this script runs all meaningful ones.
Columns, all against plain torch in float32: relative error of step 1's loss and of its gradient norm (before clipping);
the worst parameter's |gradient - right| / |right| in the 2-norm, each gradient gathered from all ranks out of AdamW's
first moment after step 1; the worst absolute error of any weight after three steps; the relative error of the loss on
other data then. A layout is right if all five are within the limits of its dtype: 1e-5 in float32; in bfloat16 those of
tests/support/layout_oracle.py, for gradients 1.5 times the error of plain torch in one process in bfloat16.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import autotp_oracle
import measuring as common

from kdtrain.testing.ranks import ENGINE_MODULES, RankPool
from tests.support.layout_oracle import ERRORS, LIMITS, Oracle, errors_of, oracle
from tests.support.layout_steps import SEQUENCES, Case, run_cases

TABLE, CUDA_TABLE = (common.ROOT / f"docs/results/{name}.md" for name in ("layouts", "layouts_cuda"))
GROUP, TIMEOUT_S = 16, 300
FAMILIES = ("llama", "llama_untied", "qwen3", "qwen3_tied", "gpt_neox", "gpt_neox_tied", "qwen2", "gemma3")

SECOND_OPINION = (
    "The same step under AutoTP, in ranks of its own (`proofs/autotp_oracle.py`); errors are the worst",
    "parameter's, as above. Nine query heads in three key/value groups: two ranks hold unequal parts.",
)


def cases() -> dict[int, list[Case]]:
    """World size -> layouts. Without a teacher: families x tp x stages; with one: its layouts x tp x stages."""
    found: dict[int, list[Case]] = {1: [], 2: [], 4: []}
    for world, tp in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 1), (4, 4)):
        found[world] += [*plain_cases(world, tp), *distilled_cases(world, tp)]
    for world, tp, cp in ((2, 1, 2), (4, 1, 2), (4, 2, 2), (4, 1, 4)):
        found[world] += context_cases(world, tp, cp)
    return found


def cut_of(world: int, tp: int, number: int) -> tuple[int, ...]:
    """Sequences per micro-batch in the three steps: all at once, one by one, uneven; in turn."""
    whole = SEQUENCES * tp // world
    some = min(3, whole)
    return ((whole, 1, some), (1, whole, 1), (some, 1, whole), (whole, whole, whole))[number % 4]


def plain_cases(world: int, tp: int) -> list[Case]:
    """Cross-entropy: llama at every stage, the other families at one or two, each stage somewhere; bfloat16."""
    found: list[Case] = []
    for number, family in enumerate(FAMILIES):
        stages = (number % 4, (number + 2) % 4)[: 2 if world < 4 else 1]
        for stage in (0, 1, 2, 3) if family == "llama" else stages:
            cut, recompute = cut_of(world, tp, number + stage), stage == number % 4
            found.append(Case(family, tp, stage, cut, recompute=recompute))
    found += [Case("llama", tp, stage, cut_of(world, tp, stage), dtype="bfloat16") for stage in (1, 3)]
    return found if tp == 1 else [*found, *divided_cases(world, tp)]


def divided_cases(world: int, tp: int) -> list[Case]:
    """Sequence parallelism: every family, each stage, with and without recomputation and teachers; bfloat16."""
    found: list[Case] = []
    for number, family in enumerate(FAMILIES):
        cut, teacher = cut_of(world, tp, number), (None, "plain", "tp")[number % 3]
        found.append(Case(family, tp, number % 4, cut, recompute=number % 2 == 1, teacher=teacher, sequence=True))
    return [*found, Case("llama", tp, 2, cut_of(world, tp, 2), dtype="bfloat16", sequence=True)]


def distilled_cases(world: int, tp: int) -> list[Case]:
    """Each of the teacher's layouts beside students of two stages; one in bfloat16."""
    found: list[Case] = []
    for number, teacher in enumerate(teachers(world, tp)):
        for stage in (number % 4, (number + (1 if world == 4 else 2)) % 4):
            family = "llama" if stage % 2 else "qwen3"
            found.append(Case(family, tp, stage, cut_of(world, tp, number + stage), teacher=teacher))
    return [*found, Case("llama", tp, 2, cut_of(world, tp, 2), dtype="bfloat16", teacher="plain")]


def context_cases(world: int, tp: int, cp: int) -> list[Case]:
    """Ranks that share sequences: families at two stages each, the teacher's layouts of the same tp, bfloat16."""
    found: list[Case] = []
    for number, family in enumerate(("qwen3", "gpt_neox", "gemma3")):
        for stage in (number, (number + 2) % 4):
            cut, recompute = cut_of(world, tp * cp, number + stage), stage == number
            found.append(Case(family, tp, stage, cut, recompute=recompute, cp=cp))
    for number, teacher in enumerate(f"{cut}{more}" for cut in ("plain", "tp")[:tp] for more in ("", " zero3")):
        cut = cut_of(world, tp * cp, number)
        found.append(Case("qwen3", tp, (number + cp) % 4, cut, teacher=teacher, cp=cp))
    if tp > 1:
        found.append(Case("qwen3", tp, 2, cut_of(world, tp * cp, 1), cp=cp, sequence=True))
    cut = cut_of(world, tp * cp, 1)
    return [*found, *(Case(family, tp, 2, cut, dtype="bfloat16", cp=cp) for family in ("qwen3", "gpt_neox"))]


def teachers(world: int, tp: int) -> list[str]:
    """Where the teacher's weights may lie: whole, cut like the student, cut over more ranks; divided by ZeRO-3."""
    cuts = ["plain"]
    if tp > 1:
        cuts.append("tp")
    cuts += [f"tp{teacher}" for teacher in (2, 4) if tp < teacher <= world]
    return [f"{cut}{more}" for cut in cuts for more in ("", " zero3", " zero3 offload") if world > 1 or not more]


@dataclass(slots=True)
class Row:
    """One layout. errors, limits: by name, empty when it failed; problem: why, in a line."""

    world: int
    case: Case
    loss: float
    grad_norm: float
    errors: dict[str, float]
    limits: dict[str, float]
    problem: str = ""

    @property
    def verdict(self) -> str:
        if self.problem:
            return self.problem
        wrong = [name for name in ERRORS if not self.errors[name] <= self.limits[name]]
        return f"WRONG: {', '.join(wrong)}" if wrong else "right"


def run_group(
    world: int, chosen: list[Case], folder: Path, device_type: str = "cpu"
) -> list[tuple[list[Any] | None, str]]:
    """Per layout (each rank's result or None, reason). If a group fails, its layouts run one at a time."""
    try:
        return [(answers, "") for answers in attempt(world, chosen, folder, device_type)]
    except (AssertionError, TimeoutError) as error:
        if len(chosen) == 1:
            return [(None, f"FAILED: {first_line(error)}")]
        print(f"{world} ranks: {first_line(error)}; one layout at a time now", flush=True)
    return [answer for case in chosen for answer in run_group(world, [case], folder, device_type)]


def attempt(world: int, chosen: list[Case], folder: Path, device_type: str) -> list[list[Any]]:
    """Per layout each rank's answer, from fresh ranks. Raises AssertionError and TimeoutError."""
    if device_type == "cuda":
        pool = RankPool(world, {"DS_ACCELERATOR": "cuda"}, fresh=True, backend="nccl")
    else:
        pool = RankPool(world, preload=ENGINE_MODULES)
    try:
        answers = pool.run(run_cases, timeout_s=TIMEOUT_S, folder=folder, cases=chosen, device_type=device_type)
    finally:
        pool.close()
    return [list(of_ranks) for of_ranks in zip(*answers, strict=True)]


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].replace("|", "/")[:160]


def row_of(world: int, case: Case, answers: list[Any] | None, problem: str, want: Oracle, root: Path) -> Row:
    if answers is None:
        return Row(world, case, float("nan"), float("nan"), {}, {}, problem)
    if any(answer != answers[0] for answer in answers):
        problem = "WRONG: ranks disagree"
    errors = {kind: error for kind, (error, _) in errors_of(answers[0], want, root).items() if kind in ERRORS}
    loss, norm = answers[0][0][0]
    return Row(world, case, loss, norm, errors, want.limits(case.dtype), problem)


def refuse_too_few_devices(chosen: dict[int, list[Case]], device_type: str) -> None:
    """SystemExit unless every rank of the largest world has a CUDA device of its own."""
    import torch

    ranks, there = max((world for world, some in chosen.items() if some), default=0), torch.cuda.device_count()
    if device_type == "cuda" and ranks > there:
        enough = [str(world) for world in sorted(cases()) if world <= there]
        raise SystemExit(
            f"--device cuda: layouts of {ranks} ranks, but this machine has {there} CUDA devices\n"
            "  why: every rank needs one of its own; NCCL refuses two ranks on a device\n"
            f"  fix: {'--ranks ' + ' '.join(enough) if enough else 'use a machine with GPUs, or --device cpu'}"
        )


def measure(folder: Path, chosen: dict[int, list[Case]], device_type: str = "cpu") -> list[Row]:
    """Every layout's row, in order."""
    import torch

    rows: list[Row] = []
    everything = {case.what for some in chosen.values() for case in some}
    oracles = {what: oracle(folder, *what, device=torch.device(device_type)) for what in sorted(everything)}
    for world, case_list in chosen.items():
        for start in range(0, len(case_list), GROUP):
            some, started = case_list[start : start + GROUP], time.monotonic()
            for case, (answers, problem) in zip(some, run_group(world, some, folder, device_type), strict=True):
                rows.append(row_of(world, case, answers, problem, oracles[case.what], folder / case.name))
            print(f"{len(some)} layouts on {world} ranks in {time.monotonic() - started:.0f} s", flush=True)
    return rows


def second_opinion(folder: Path) -> list[str]:
    """DeepSpeed's own tensor parallelism on the same step."""
    want = oracle(folder, autotp_oracle.FAMILY, False)
    try:
        lines = autotp_oracle.compare(folder, want)
    except (AssertionError, TimeoutError) as error:
        lines = [f"FAILED: {first_line(error)}"]
    return ["", "## DeepSpeed's own tensor parallelism", "", *SECOND_OPINION, "", *lines]


def line_of(row: Row) -> str:
    case, dp = row.case, row.world // (row.case.tp * row.case.cp)
    micro = " ".join(str(count) for count in case.micro)
    errors = " | ".join(f"{row.errors[name]:.1e}" if row.errors else "" for name in ERRORS)
    how = " recompute" * case.recompute + " sequence" * case.sequence
    return (
        f"| {case.family}{how} | {case.dtype} | {row.world} | {case.tp} | {case.cp} | {dp} "
        f"| {case.stage} | {micro} | {case.teacher or 'none'} | {row.loss:.6f} | {row.grad_norm:.6f} | {errors} "
        f"| {row.verdict} |"
    )


def made_where(device_type: str) -> tuple[str, str]:
    """By which command, and on what."""
    import torch

    if device_type == "cuda":
        return "`--device cuda`", f"nccl, a {torch.cuda.get_device_name()} per rank"
    return "`make layouts`", "gloo on a CPU"


def table_of(rows: list[Row], more: list[str], device_type: str = "cpu") -> str:
    """Markdown; `more` stands after the table."""
    import deepspeed
    import torch

    exact = [row for row in rows if row.case.dtype == "float32" and row.errors]
    worst = {name: max((row.errors[name] for row in exact), default=float("nan")) for name in ERRORS}
    right = sum(row.verdict == "right" for row in rows)
    half = LIMITS["bfloat16"]
    made, where = made_where(device_type)
    return "\n".join(
        [
            "# Layouts against plain torch in one process",
            "",
            f"Made by {made} (`proofs/layouts.py`, which explains the columns).",
            f"Commit {common.current_commit()}, {common.today()}, torch {torch.__version__}, deepspeed "
            f"{deepspeed.__version__}, {where}.",
            "",
            f"**{right} of {len(rows)} layouts are right** (all errors within 1e-5 in float32). Worst in float32: "
            + ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
            + ".",
            "",
            f"Limits in bfloat16: loss {half['loss']:g}, norm {half['norm']:g}, gradient {half['gradient']:g} times",
            f"the error of plain torch in bfloat16, weight {half['weight']:g}, evaluation {half['evaluation']:g}.",
            "tp, cp, dp, ZeRO: the student's; sequence: Megatron sequence parallelism.",
            "Sequences: per micro-batch and data rank, in steps 1, 2 and 3.",
            "Teacher: plain, whole on every rank; tp, cut like the student; tp2, tp4, cut over that many ranks; zero3,",
            "divided among data ranks besides; offload, in host memory. A teacher means skewed KL at temperature 2,",
            "cross-entropy and a z-loss.",
            "",
            "| student | dtype | ranks | tp | cp | dp | ZeRO | sequences | teacher | loss | gradient norm "
            "| loss error | norm error | gradient error | weight error | evaluation error | verdict |",
            "| --- | --- |" + " ---: |" * 5 + " --- | --- |" + " ---: |" * 7 + " --- |",
            *(line_of(row) for row in rows),
            *more,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", metavar="TEXT", help="only layouts whose name contains TEXT; writes nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU per rank, NCCL; unproven")
    parser.add_argument(
        "--ranks", type=int, nargs="+", choices=(1, 2, 4), help="some worlds; writes nothing on the CPU"
    )
    arguments = parser.parse_args()
    device_type, is_whole = arguments.device, not arguments.match
    chosen = {world: some for world, some in cases().items() if arguments.ranks is None or world in arguments.ranks}
    if arguments.match:
        chosen = {world: [case for case in some if arguments.match in case.name] for world, some in chosen.items()}
    refuse_too_few_devices(chosen, device_type)
    with tempfile.TemporaryDirectory(prefix="layouts_") as folder:
        rows = measure(Path(folder), chosen, device_type)
        more = second_opinion(Path(folder)) if is_whole and device_type == "cpu" else []
    text = table_of(rows, more, device_type)
    if is_whole and (device_type == "cuda" or arguments.ranks is None):
        common.write_whole(CUDA_TABLE if device_type == "cuda" else TABLE, text)
    print(text, end="")
    return int(any(row.verdict != "right" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
