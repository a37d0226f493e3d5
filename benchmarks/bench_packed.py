"""Attention within packed documents: kdtrain's packed attention against transformers' S x S mask, on a CPU.

    python benchmarks/bench_packed.py           # measures, 5 minutes -> benchmarks/results/{packed_cpu,goals}.csv
    python benchmarks/bench_packed.py --table   # CSV -> docs/results/packed_cpu.md, and prints it
    python benchmarks/bench_packed.py --try     # measures 512 and 1,024 tokens and writes nothing

The first command waits until the machine is quiet (load of at most 0.5) and refuses to start if it is not within five
minutes; --busy measures anyway. float32; one sequence of S tokens, cut into documents at S // 500 places drawn from a
seed; 4 layers of 8 query heads in 2 groups of width 64, all of whose forward passes come before the backward passes, as
in a model. What one forward pass makes once for all layers is made once and counts. Every number comes from a fresh
process. Providers:

naive    create_causal_mask and sdpa_attention_forward of transformers: what a stock model does with attention=sdpa
packed   kdtrain.models.packed.attend_documents, what attention=packed does, reading the documents from position_ids

Before anything is timed, outputs and gradients at this very shape are compared with float64, document by document:
error is the largest absolute difference, relative to the largest element of that tensor. A provider further off than
1e-4 is not timed and marked in its row; if it is kdtrain's own, nothing is written. Times and memory: as in
benchmarks/bench_loss_head.py, forward and backward. peak_bytes: growth of resident memory beyond inputs, their
gradients (which exist and are touched beforehand) and outputs (subtracted). load: when the script began.
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
from bench_import import wait_until_quiet, write_goals
from measuring import ROOT

RESULTS, GOALS = ROOT / "benchmarks/results/packed_cpu.csv", ROOT / "benchmarks/results/goals.csv"
TABLE = ROOT / "docs/results/packed_cpu.md"
COLUMNS = tuple("error" if name == "gradient_error" else name for name in common.COLUMNS)
COLUMNS = (*COLUMNS[:-1], "load", COLUMNS[-1])
COMMAND = "python benchmarks/bench_packed.py"
LAYERS, HEADS, GROUPS, WIDTH, DOCUMENT_TOKENS = 4, 8, 2, 64, 500
LENGTHS, TRIAL = (1024, 8192), (512, 1024)
PROVIDERS = ("naive", "packed")
AGREEMENT = 1e-4


def document_lengths(seq_len: int) -> list[int]:
    """Of about DOCUMENT_TOKENS tokens, drawn from a seed."""
    import numpy as np

    borders = np.random.default_rng(0).integers(1, seq_len, seq_len // DOCUMENT_TOKENS)
    ends = np.unique(np.append(borders, seq_len))
    return np.diff(ends, prepend=0).tolist()


def inputs(seq_len: int) -> tuple:
    """(position_ids [1, S], query, key and value of every layer, gradient of an output), alike for every provider."""
    import torch

    rng = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(length) for length in document_lengths(seq_len)])[None]
    shapes = [(1, seq_len, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    layers = [[torch.randn(shape, generator=rng) for shape in shapes] for _ in range(LAYERS)]
    leaves = [[x.transpose(1, 2).requires_grad_() for x in layer] for layer in layers]
    return positions, leaves, torch.randn(shapes[0], generator=rng)


def forward(provider: str, positions, layers: list) -> list:
    """Outputs [1, S, H, d] of all layers."""
    return {"naive": naive, "packed": packed}[provider](positions, layers)


def naive(positions, layers: list) -> list:
    """transformers' own functions: one boolean mask for all layers."""
    from types import SimpleNamespace

    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import create_causal_mask

    config = SimpleNamespace(_attn_implementation="sdpa", is_causal=True, sliding_window=None)
    embeddings = torch.empty(*positions.shape, 0)
    mask = create_causal_mask(config, embeddings, None, None, positions)
    module = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, is_causal=True)
    return [sdpa_attention_forward(module, *layer, mask, scaling=WIDTH**-0.5)[0] for layer in layers]


def packed(positions, layers: list) -> list:
    """kdtrain's."""
    from kdtrain.documents import Documents
    from kdtrain.models.packed import attend_documents
    from kdtrain.models.packed_layout import PackedDocuments

    packing = PackedDocuments(Documents.of(positions))
    return [attend_documents(layer, packing, scaling=WIDTH**-0.5) for layer in layers]


def error_of(outputs: list, layers: list, grad, lengths: list[int]) -> float:
    """Of outputs and the gradients that the layers hold, against float64, one document at a time."""
    worst = 0.0
    for output, layer in zip(outputs, layers, strict=True):
        found = [output.detach(), *(x.grad.transpose(1, 2) for x in layer)]
        scales = [float(x.abs().max()) for x in found]
        for begin, length in zip(_begins(lengths), lengths, strict=True):
            part = slice(begin, begin + length)
            want = definition([x.detach()[:, :, part] for x in layer], grad[:, part])
            for x, right, scale in zip(found, want, scales, strict=True):
                worst = max(worst, float((x[:, part] - right).abs().max()) / scale)
    return worst


def _begins(lengths: list[int]) -> list[int]:
    return [sum(lengths[:number]) for number in range(len(lengths))]


def definition(qkv: list, grad) -> list:
    """Causal attention of a document in float64: [output, gradients of query, key and value], all [1, L, heads, d]."""
    import torch

    query, key, value = leaves = [x.double().requires_grad_() for x in qkv]
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    logits = query @ key.mT * WIDTH**-0.5
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    output = (logits.masked_fill(future, -torch.inf).softmax(-1) @ value).transpose(1, 2)
    output.backward(grad.double())
    return [output.detach(), *(x.grad.transpose(1, 2) for x in leaves)]


def measure(job: dict) -> dict:
    """One job in this process: whether it is right, then memory, then times."""
    import platform

    import torch
    import transformers

    positions, layers, grad = inputs(job["seq_len"])
    for x in (x for layer in layers for x in layer):
        x.grad = torch.full_like(x, 0.0)  # touched: its pages are not part of the growth

    def run() -> list:
        outputs = forward(job["provider"], positions, layers)
        torch.autograd.backward(outputs, [grad] * len(outputs))
        return outputs

    outputs = run()
    error = error_of(outputs, layers, grad, document_lengths(job["seq_len"]))
    produced = sum(x.nbytes for x in outputs)
    del outputs
    versions = f"python {platform.python_version()} torch {torch.__version__} transformers {transformers.__version__}"
    answer = {"versions": versions, "threads": torch.get_num_threads(), "error": error}
    if not error <= AGREEMENT:
        return {**answer, "absent": f"wrong: error {error:.1e}"}
    measured = common.peak_and_times(run)
    return {**answer, **measured, "peak_bytes": measured["peak_bytes"] - produced}


def row_of(job: dict, answer: dict, commit: str, load: float) -> dict:
    lengths = document_lengths(job["seq_len"])
    row = {
        "commit": commit,
        "date": common.today(),
        "device": f"{common.cpu_name()}, {answer['threads']} threads",
        "versions": answer["versions"],
        "task": "attention",
        "shape": f"S={job['seq_len']} in {len(lengths)} documents, {LAYERS} layers, H={HEADS} K={GROUPS} d={WIDTH}",
        "provider": job["provider"],
        "mode": "train",
        "error": f"{answer['error']:.1e}",
        "load": f"{load:.2f}",
        "absent": answer.get("absent", ""),
    }
    return row if row["absent"] else {**row, **common.percentiles(answer["times"]), "peak_bytes": answer["peak_bytes"]}


def run_all(lengths: tuple[int, ...]) -> list[dict]:
    """Rows with ratios. SystemExit if kdtrain's own are wrong."""
    commit, load, rows = common.current_commit(), os.getloadavg()[0], []  # before this script causes any
    for seq_len in lengths:
        for provider in PROVIDERS:
            job = {"seq_len": seq_len, "provider": provider}
            rows.append(row_of(job, common.in_fresh_process(__file__, job), commit, load))
            if rows[-1]["absent"] and provider == "packed":
                raise SystemExit(f"{job}: {rows[-1]['absent']}")
            print(*(rows[-1].get(name, "") for name in COLUMNS[5:]), sep="  ", flush=True)
    return common.with_ratios(rows)


def goals_of(rows: list[dict]) -> list[dict]:
    """The goals as rows of goals.csv: at the longest sequence memory and time, at the shortest time."""
    short, long = (row for row in (rows[1], rows[-1]))
    found = {
        "packed_attention_peak_ratio_8192": (long["peak_ratio"], "0.1"),
        "packed_attention_time_ratio_8192": (long["time_ratio"], "0.5"),
        "packed_attention_time_ratio_1024": (short["time_ratio"], "1"),
    }
    same = {"commit": rows[0]["commit"], "date": rows[0]["date"], "command": COMMAND}
    return [
        {"name": name, "measured": measured, "goal": goal, "better": "lower", **same}
        for name, (measured, goal) in found.items()
    ]


def table_of(rows: list[dict]) -> str:
    """Markdown of the CSV, as it was measured."""
    first = rows[0]
    lines = [
        "# Attention within packed documents: time and memory on a CPU",
        "",
        "Made by `python benchmarks/bench_packed.py --table` from `benchmarks/results/packed_cpu.csv`; what columns",
        "and providers mean is in that script. S tokens of one sequence, H query heads in K groups of width d. Peak:",
        "beyond inputs, outputs and their gradients.",
        "",
        f"Commit {first['commit']}, {first['date']}, {first['device']}, {first['versions']}, load {first['load']}.",
        "",
        *common.markdown_rows(rows, errors=("error",)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", action="store_true", help="measure and publish although the machine is busy")
    parser.add_argument("--try", dest="trial", action="store_true", help="small sizes; writes nothing")
    parser.add_argument("--table", action="store_true", help="write the table from the CSV instead of measuring")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one))))
    elif arguments.table:
        text = table_of(common.read_csv(RESULTS, COMMAND))
        common.write_whole(TABLE, text)
        print(text, end="")
    elif arguments.trial:
        run_all(TRIAL)
    else:
        if not arguments.busy:
            wait_until_quiet()
        rows = run_all(LENGTHS)
        common.write_csv(RESULTS, rows, COLUMNS)
        write_goals(GOALS, goals_of(rows))
        for goal in goals_of(rows):
            print(goal["name"], goal["measured"], f"(goal {goal['goal']}, {goal['better']} is better)")


if __name__ == "__main__":
    main()
