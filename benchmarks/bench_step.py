"""A whole distillation step against its necessary parts: a plain step of the student and a forward pass of the teacher.

    python benchmarks/bench_step.py            # measures -> benchmarks/results/cpu_step.csv (on a GPU: gpu_step.csv)
    python benchmarks/bench_step.py --table    # CSV -> docs/results/bench_step_cpu.md, and prints it

Random weights and random tokens; the trainer, the engine, the loader and the objectives are those of a run. Every job
is a fresh process, or one per rank. In it rounds of three modes alternate, so that load on the machine affects all
alike:

distill   the whole step: data, teacher, student, loss, backward, optimizer, metrics
lm        the same with cross-entropy alone: same engine, same batches, no teacher
teacher   the teacher's forward over the same micro-batches with its head, logits in chunks of tokens, dropped at once

ratio: median of distill to the sum of the medians of lm and teacher; 1 means distillation adds nothing of its own.
ratio_fastest: the same of the fastest step of each, which a busy machine disturbs least.
Phases are means per step: data (waiting for the loader), teacher, decoder (the student's, forward), head (both
heads' products, the loss and its gradients, which the forward computes), backward, optimizer (reduce, clip, AdamW),
rest (everything else in the step). On CUDA phases are CUDA events and the device is synchronised once per step.
peak_bytes: of rank 0 over the first distill round. On the CPU it is the growth of the resident set since before the
models were built (and after a step of tiny ones, which brings the libraries in), on CUDA that of allocated memory.
parts: of the estimate of `kdtrain.planning.estimate`, in bytes; estimate_bytes: the estimated peak.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring as common
from measuring import ROOT
from step_rank import PHASES, measure

COLUMNS = (
    *("commit", "date", "device", "versions", "shape", "layout", "mode", "median_ms", "p20_ms", "p80_ms", "fastest_ms"),
    *("ratio", "ratio_fastest"),
    *(f"{phase}_ms" for phase in PHASES),
    *("peak_bytes", "estimate_bytes", "parts"),
)
MODES = ("distill", "lm", "teacher")
CPU = {"student": "llama-5m", "vocab": 49152, "seq_len": 128, "sequences": 4, "micro": 2, "dtype": "float32"}
GPU = {"student": "qwen2-miniplm-200m", "vocab": 151936, "seq_len": 1024, "sequences": 32, "micro": 8}


def jobs(device: str) -> list[dict]:
    """What is measured: on a CPU a small and a large teacher, then two ranks; on a GPU real sizes."""
    shared = {
        "ranks": 1,
        "tp": 1,
        "zero": 1,
        "rounds": 4,
        "steps": 3,
        "slab_bytes": 1 << 27,
        "device": device,
        "threads": 1,
    }
    if device == "cuda":
        gpu = {**shared, **GPU, "dtype": "bfloat16", "slab_bytes": 1 << 30, "rounds": 6, "steps": 5}
        return [{**gpu, "teacher": name} for name in ("qwen2-miniplm-500m", "qwen3-1.7b")]
    cpu = {**shared, **CPU, "rounds": 7}
    return [
        {**cpu, "teacher": "llama-20m"},
        {**cpu, "teacher": "smollm2-135m"},
        {**cpu, "teacher": "llama-20m", "ranks": 2, "tp": 2},
        {**cpu, "teacher": "llama-20m", "ranks": 2, "zero": 2},
    ]


def kind(device: str) -> str:
    return "gpu" if device == "cuda" else "cpu"


def results_of(device: str) -> Path:
    return ROOT / f"benchmarks/results/{kind(device)}_step.csv"


def shape_of(job: dict) -> str:
    tokens = job["sequences"] * job["seq_len"]
    name_s, name_t = (Path(job[role]).stem for role in ("student", "teacher"))
    return f"{name_s} from {name_t}, V={job['vocab']}, {tokens} tokens = {job['sequences']} x {job['seq_len']}"


def layout_of(job: dict) -> str:
    dp = job["ranks"] // job["tp"]
    return f"{job['dtype']} tp {job['tp']} dp {dp} ZeRO {job['zero']}, {job['micro']} sequences per micro-batch"


def versions() -> str:
    import platform
    from importlib.metadata import version

    packages = " ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    return f"python {platform.python_version()} {packages}"


def run_job(job: dict, script: str = __file__, **environment: str) -> dict:
    """`script --one` on every rank, each a fresh process; rank 0's answer. Raises if a rank fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(job["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world["DS_ACCELERATOR"] = job["device"]
    with tempfile.TemporaryDirectory(prefix="bench_step_") as folder:
        ranks = []
        for rank in range(job["ranks"]):
            command = [sys.executable, script, "--one", json.dumps({**job, "folder": folder, "rank": rank})]
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(job["threads"]), **environment}
            ranks.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **world, **own})
            )
        outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"{script}: ranks ended with {[process.returncode for process in ranks]}; job {job}")
    return json.loads(outputs[0].splitlines()[-1])


def rows_of(job: dict, answer: dict, commit: str) -> list[dict]:
    """One row per mode; ratio and memory on distill's."""

    def ratio(of: Callable[[list[float]], float]) -> str:
        distill, lm, teacher = (of(answer["seconds"][mode]) for mode in MODES)
        return f"{distill / (lm + teacher):.3f}"

    rows = []
    for mode in MODES:
        phases = answer["phases"].get(mode, {mode: statistics.mean(answer["seconds"][mode])})
        rows.append(
            {
                "commit": commit,
                "date": common.today(),
                "device": f"{answer['device']}, {job['ranks']} x {answer['threads']} threads",
                "versions": versions(),
                "shape": shape_of(job),
                "layout": layout_of(job),
                "mode": mode,
                **common.percentiles(answer["seconds"][mode]),
                "fastest_ms": f"{1000 * min(answer['seconds'][mode]):.4g}",
                **{f"{phase}_ms": f"{1000 * seconds:.4g}" for phase, seconds in phases.items()},
            }
        )
    rows[0] |= {
        "ratio": ratio(statistics.median),
        "ratio_fastest": ratio(min),
        "peak_bytes": answer["peak_bytes"],
        "estimate_bytes": answer["estimate_bytes"],
        "parts": json.dumps(answer["parts"]),
    }
    return rows


def table_of(rows: list[dict], device: str) -> str:
    """Markdown of the CSV: times, where they go, memory against its estimate."""
    first = rows[0]
    lines = [
        f"# A whole distillation step on {'a GPU' if device == 'cuda' else 'a CPU'}",
        "",
        f"Made by `python benchmarks/bench_step.py --table` from `benchmarks/results/{kind(device)}_step.csv`; what",
        "the modes, phases (ms) and columns mean is in that script. ratio: distill to lm + teacher, by their medians;",
        "of fastest: by the fastest step of each, which is more reliable if other work shares the machine.",
        "",
        f"Commit {first['commit']}, {first['date']}, {first['device'].rpartition(',')[0]}; {first['versions']}.",
        "",
        "| student from teacher | layout | mode | median ms | p20 - p80 | fastest | ratio | of fastest | "
        + " | ".join(PHASES)
        + " |",
        "| --- | --- | --- |" + " ---: |" * (5 + len(PHASES)),
    ]
    for row in rows:
        phases = " | ".join(row[f"{phase}_ms"] for phase in PHASES)
        lines.append(
            f"| {row['shape']} | {row['layout']} | {row['mode']} | {row['median_ms']} | {row['p20_ms']} - "
            f"{row['p80_ms']} | {row['fastest_ms']} | {row['ratio']} | {row['ratio_fastest']} | {phases} |"
        )
    lines += ["", "## What distilling adds", "", *added_lines(rows)]
    lines += ["", "## Memory per rank", "", *memory_lines(rows)]
    return "\n".join(lines) + "\n"


def added_lines(rows: list[dict]) -> list[str]:
    """distill less lm less teacher, by phases. The teacher's head is in its own forward there, in `head` here."""
    lines = [
        "Means per step in ms: distill less lm less teacher, and where it arises. The loss head's part is teacher and",
        "head of distill less the teacher's forward and lm's head: what the divergence costs beyond cross-entropy.",
        "",
        "| student from teacher | layout | added | loss head | decoder | backward | optimizer | data and rest |",
        "| --- | --- |" + " ---: |" * 6,
    ]
    for distill, lm, teacher in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        more = {phase: float(distill[f"{phase}_ms"]) - float(lm[f"{phase}_ms"]) for phase in PHASES}
        head = more.pop("teacher") + more.pop("head") - float(teacher["teacher_ms"])
        rest = more.pop("data") + more.pop("rest")
        numbers = [head + rest + sum(more.values()), head, more["decoder"], more["backward"], more["optimizer"], rest]
        cells = " | ".join(f"{number:.1f}" for number in numbers)
        lines.append(f"| {distill['shape']} | {distill['layout']} | {cells} |")
    return lines


def memory_lines(rows: list[dict]) -> list[str]:
    def mib(size: float) -> str:
        return f"{size / 2**20:.0f}"

    distill = [row for row in rows if row["mode"] == "distill"]
    names = list(json.loads(distill[0]["parts"]))
    lines = [
        "Peak of rank 0 in MiB, the estimate made beforehand, and its parts.",
        "",
        "| student from teacher | layout | peak | estimate | peak / estimate | " + " | ".join(names) + " |",
        "| --- | --- | ---: | ---: | ---: |" + " ---: |" * len(names),
    ]
    for row in distill:
        peak, estimate, parts = int(row["peak_bytes"]), int(row["estimate_bytes"]), json.loads(row["parts"])
        lines.append(
            f"| {row['shape']} | {row['layout']} | {mib(peak)} | {mib(estimate)} | {peak / estimate:.2f} | "
            + " | ".join(mib(parts[name]) for name in names)
            + " |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table from the CSV instead of measuring")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one))))
        sys.stdout.flush()
        os._exit(0)  # gloo's threads abort now and then at interpreter exit
    device = arguments.device or default_device()
    results = results_of(device)
    if arguments.table:
        text = table_of(common.read_csv(results, "python benchmarks/bench_step.py"), device)
        common.write_whole(ROOT / f"docs/results/bench_step_{kind(device)}.md", text)
        print(text, end="")
        return
    commit, rows = common.current_commit(), []
    for job in jobs(device):
        rows += rows_of(job, run_job(job), commit)
        for row in rows[-len(MODES) :]:
            print(*(row.get(name, "") for name in COLUMNS[4:13]), flush=True)
    common.write_csv(results, rows, COLUMNS)


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
