"""What a rank of a run allocates under ZeRO, part by part, against what is estimated before it starts.

    python benchmarks/bench_memory.py            # measures -> benchmarks/results/cpu_memory.csv
    python benchmarks/bench_memory.py --table    # CSV -> docs/results/memory_cpu.md, and prints it

Random weights and random tokens; engine, loader and objective are those of a run without a teacher, on two gloo ranks,
each a fresh process. Figures are of rank 0 in its second step, when AdamW's states exist.

allocated  the most bytes that tensors held at once, counted as operations made them (memory_rank.py)
resident   growth of the resident set over the same step, with every page touched that malloc returned (glibc's
           MALLOC_PERTURB_): it includes what no operation made, and proves that no tensor was missed. oneDNN is held
           to AVX2: with AVX-512 it compiles kernels for every length of a document in bfloat16 and keeps 1,024 of them
           (45 MiB in this run, 1.3 GB after 400 lengths), code that is not a tensor and that no CUDA run has
estimate   `kdtrain.planning.estimate`, from shapes alone

Each layout runs with the bucket that kdtrain gives DeepSpeed, no larger than the model, and with DeepSpeed's own size
of half a billion elements, which it had before. The rows of a part: its own peak and its estimate. Parts do not add up
to the total, because they peak at different times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring as common
from bench_step import run_job, versions
from measuring import ROOT
from memory_rank import PARTS, measure

COLUMNS = (
    *("commit", "date", "device", "versions", "shape", "layout", "bucket", "part"),
    *("estimate_bytes", "allocated_bytes", "at_peak_bytes", "resident_bytes"),
)
RESULTS, TABLE = ROOT / "benchmarks/results/cpu_memory.csv", ROOT / "docs/results/memory_cpu.md"
COMMAND = "python benchmarks/bench_memory.py"
HALF_A_BILLION = 500_000_000
BOUND = 0.1
"""Largest relative difference between allocated and estimated bytes in published totals."""
TOUCHED = {"MALLOC_PERTURB_": "165", "MALLOC_MMAP_THRESHOLD_": "65536", "ONEDNN_MAX_CPU_ISA": "AVX2"}
STUDENT = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
}
LAYOUTS = tuple((dtype, zero) for dtype in ("bfloat16", "float32") for zero in (1, 2, 3))


def jobs() -> list[dict]:
    """Every layout with both buckets."""
    shared = {
        "student": STUDENT,
        "vocab": 4096,
        "seq_len": 512,
        "sequences": 8,
        "micro": 2,
        "tp": 1,
        "ranks": 2,
        "slab_bytes": 1 << 23,
        "steps": 2,
        "device": "cpu",
        "threads": 1,
    }
    return [
        {**shared, "dtype": dtype, "zero": zero, "bucket": bucket}
        for dtype, zero in LAYOUTS
        for bucket in (None, HALF_A_BILLION)
    ]


def rows_of(job: dict, answer: dict, commit: str) -> list[dict]:
    """The total, then each part."""
    shared = {
        "commit": commit,
        "date": common.today(),
        "device": answer["device"],
        "versions": versions(),
        "shape": f"{answer['parameters']:,} parameters, {job['micro']} x {job['seq_len']} tokens per micro-batch",
        "layout": f"{job['dtype']} dp {job['ranks']} ZeRO {job['zero']}",
        "bucket": job["bucket"] or "bounded",
    }
    total = {
        "part": "total",
        "estimate_bytes": answer["estimate_bytes"],
        "allocated_bytes": answer["peak_bytes"],
        "at_peak_bytes": answer["peak_bytes"],
        "resident_bytes": answer["resident_bytes"],
    }
    parts = [
        {
            "part": part,
            "estimate_bytes": answer["parts"][part],
            "allocated_bytes": answer["most"][part],
            "at_peak_bytes": answer["at_peak"][part],
        }
        for part in PARTS
    ]
    return [{**shared, **row} for row in (total, *parts)]


def mib(size: str) -> str:
    """As the tables show it."""
    return f"{int(size) / 2**20:,.1f}"


def table_of(rows: list[dict]) -> str:
    """Markdown of the CSV: totals of both buckets, then parts with the bounded one."""
    first = rows[0]
    lines = [
        "# Memory under ZeRO against its estimate",
        "",
        f"Made by `{COMMAND} --table` from",
        "`benchmarks/results/cpu_memory.csv`; what is measured is explained in that script.",
        "",
        f"Commit {first['commit']}, {first['date']}, {first['device']}; {first['versions']}.",
        f"{first['shape']}; rank 0 of 2.",
        "",
        "On the CPU stage 2 has one bucket, gloo copies what it reduces at stage 3, and AdamW is not fused. On CUDA",
        "there are two buckets and neither copy. The estimate has them so; nothing here shows it, no CUDA run was",
        "measured.",
        "",
        "## Totals",
        "",
        "MiB. Bucket: bounded by the model, as kdtrain has it; or as many elements as DeepSpeed takes by itself, which",
        "a run had before. ZeRO 1 of a bfloat16 model has no bucket in DeepSpeed 0.19.8.",
        "",
        "| layout | bucket | allocated | resident | estimate | allocated / estimate | resident / estimate |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in (row for row in rows if row["part"] == "total"):
        bucket = row["bucket"] if row["bucket"] == "bounded" else f"{int(row['bucket']):,}"
        lines.append(
            f"| {row['layout']} | {bucket} | {mib(row['allocated_bytes'])} | {mib(row['resident_bytes'])} "
            f"| {mib(row['estimate_bytes'])} | {ratio(row, 'allocated_bytes')} | {ratio(row, 'resident_bytes')} |"
        )
    lines += ["", "## Parts", "", "MiB with the bounded bucket: the most there was of each part / its estimate.", ""]
    lines += [f"| layout | {' | '.join(PARTS)} |", f"| --- |{' ---: |' * len(PARTS)}"]
    for layout in dict.fromkeys(row["layout"] for row in rows):
        of = {row["part"]: row for row in rows if row["layout"] == layout and row["bucket"] == "bounded"}
        cells = (f"{mib(of[part]['allocated_bytes'])} / {mib(of[part]['estimate_bytes'])}" for part in PARTS)
        lines.append(f"| {layout} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ratio(row: dict, column: str) -> str:
    """To the estimate."""
    return f"{int(row[column]) / int(row['estimate_bytes']):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table from the CSV instead of measuring")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one))))
        sys.stdout.flush()
        os._exit(0)  # gloo's threads abort now and then at interpreter exit
    if arguments.table:
        text = table_of(common.read_csv(RESULTS, COMMAND))
        common.write_whole(TABLE, text)
        print(text, end="")
        return
    commit, rows = common.current_commit(), []
    for job in jobs():
        rows += rows_of(job, run_job(job, __file__, **TOUCHED), commit)
        total = rows[-1 - len(PARTS)]
        print(*(total[name] for name in ("layout", "bucket", *COLUMNS[-4:])), flush=True)
    common.write_csv(RESULTS, rows, COLUMNS)


if __name__ == "__main__":
    main()
