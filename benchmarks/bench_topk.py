"""Time and peak memory of a teacher's top-k logits with their log-sum-exp and tail, against the usual torch formula.

    python benchmarks/bench_topk.py            # measures, 4 minutes -> benchmarks/results/topk_cpu.csv
    python benchmarks/bench_topk.py --table    # CSV -> docs/results/topk_cpu.md, and prints it

The first command alone regenerates the results. float32, teacher width 576, no gradients. Every number comes from a
fresh process. Providers:

streamed   kdtrain.teacher.topk.linear_topk, slab_bytes as in its name
naive      all logits in float32, torch.topk, logsumexp, the tail as log(1 - sum of the kept probabilities), as
           Megatron-LM's saver and student compute it
chunked    the naive formula on eighths of the tokens in turn

Before anything is timed, the answer at this very shape is compared with float64: error is the largest absolute
difference of a kept logit, of the float64 logit at a kept id from the float64 logit of that rank, and of the
log-sum-exp. A provider further off than 1e-4 is not timed and marked in its row; if it is kdtrain's own, nothing is
written. tail_error is the largest absolute difference of the log of the tail, nats. Times and memory: as in
benchmarks/bench_loss_head.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring as common
from measuring import ROOT

RESULTS = ROOT / "benchmarks/results/topk_cpu.csv"
TABLE = ROOT / "docs/results/topk_cpu.md"
COLUMNS = tuple("error" if name == "gradient_error" else name for name in common.COLUMNS)
COLUMNS = (*COLUMNS[:-1], "tail_error", COLUMNS[-1])
WIDTH, VOCAB, CHUNKS = 576, 50257, 8
SLABS = {"streamed-128MiB": 1 << 27, "streamed-1GiB": 1 << 30}
PROVIDERS = ("streamed-128MiB", "naive", "chunked")
AGREEMENT = 1e-4


def jobs() -> list[dict]:
    """What is measured, in order: numbers kept, then tokens, then a larger slab."""
    shapes = [(512, VOCAB, k) for k in (8, 64, 256)] + [(4096, VOCAB, 64)]
    found = [
        {"tokens": tokens, "vocab": vocab, "k": k, "provider": provider}
        for tokens, vocab, k in shapes
        for provider in PROVIDERS
    ]
    return [*found, {"tokens": 4096, "vocab": VOCAB, "k": 64, "provider": "streamed-1GiB"}]


def shape_of(job: dict) -> str:
    return f"T={job['tokens']} V={job['vocab']} E={WIDTH} k={job['k']}"


def naive(hidden, head, k: int) -> tuple:
    """(ids, logits, lse [T], log_tail [T]) from all logits at once."""
    logits = hidden.float() @ head.float().T
    values, ids = logits.topk(k, dim=-1)
    lse = logits.logsumexp(-1)
    tail = (1 - (values - lse[:, None]).exp().sum(-1)).clamp(min=1e-8).log()
    return ids, values, lse, tail


def chunked(hidden, head, k: int) -> tuple:
    """The same, an eighth of the tokens at a time."""
    import torch

    parts = [naive(part, head, k) for part in hidden.chunk(CHUNKS)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def answer_of(provider: str, hidden, head, k: int, backend: str = "auto") -> tuple:
    """(ids, logits, lse [T], log_tail [T]) of a provider."""
    from kdtrain.distributed.vocab import VocabShard
    from kdtrain.teacher.topk import linear_topk

    if provider not in SLABS:
        return {"naive": naive, "chunked": chunked}[provider](hidden, head, k)
    shard = VocabShard.of(len(head), multiple=1)
    top = linear_topk(hidden, head, k, shard=shard, slab_bytes=SLABS[provider], backend=backend)
    return top.ids, top.logits, top.lse[:, 0], top.log_tail[:, 0]


def errors_of(hidden, head, k: int, answer: tuple, chunk: int = 256) -> dict[str, float]:
    """error and tail_error of an answer, against float64 of the same inputs, `chunk` tokens at a time."""
    import torch

    head, worst, tail_worst = head.double(), 0.0, 0.0
    for first in range(0, len(hidden), chunk):
        rows = slice(first, first + chunk)
        ids, values, lse, tail = (column[rows].double() for column in answer)
        logits = hidden[rows].double() @ head.T
        expected, kept = logits.topk(k, dim=-1)
        at_ids = logits.gather(-1, ids.long())
        differences = (values - expected, at_ids - expected, lse - logits.logsumexp(-1))
        worst = max(worst, *(float(difference.abs().max()) for difference in differences))
        rest = logits.scatter(-1, kept, -torch.inf).logsumexp(-1) - logits.logsumexp(-1)
        tail_worst = max(tail_worst, float((tail - rest).abs().max()))
    return {"error": worst, "tail_error": tail_worst}


def inputs(job: dict) -> tuple:
    """Hidden states and a head with logits of standard deviation 1.5, the same for every provider."""
    import torch

    rng = torch.Generator().manual_seed(0)
    head = torch.randn(job["vocab"], WIDTH, generator=rng) * 1.5 / WIDTH**0.5
    return torch.randn(job["tokens"], WIDTH, generator=rng), head


def measure(job: dict) -> dict:
    """One job in this process: check correctness, then measure memory, then times."""
    import platform

    import torch

    with torch.no_grad():
        hidden, head = inputs(job)
        errors = errors_of(hidden, head, job["k"], answer_of(job["provider"], hidden, head, job["k"]))
        versions = f"python {platform.python_version()} torch {torch.__version__}"
        answer = {"versions": versions, "threads": torch.get_num_threads(), **errors}
        if not errors["error"] <= AGREEMENT:
            return {**answer, "absent": f"wrong: error {errors['error']:.1e}"}
        measured = common.peak_and_times(lambda: answer_of(job["provider"], hidden, head, job["k"]))
    return {**answer, **measured}


def row_of(job: dict, answer: dict, commit: str) -> dict:
    row = {
        "commit": commit,
        "date": common.today(),
        "device": f"{common.cpu_name()}, {answer['threads']} threads",
        "versions": answer["versions"],
        "task": "topk",
        "shape": shape_of(job),
        "provider": job["provider"],
        "mode": "eval",
        "error": f"{answer['error']:.1e}",
        "tail_error": f"{answer['tail_error']:.1e}",
        "absent": answer.get("absent", ""),
    }
    return row if row["absent"] else {**row, **common.percentiles(answer["times"]), "peak_bytes": answer["peak_bytes"]}


def run_all() -> None:
    commit, rows = common.current_commit(), []
    for job in jobs():
        rows.append(row_of(job, common.in_fresh_process(__file__, job), commit))
        if rows[-1]["absent"] and job["provider"] in SLABS:
            raise SystemExit(f"{job}: {rows[-1]['absent']}")
        print(*(rows[-1].get(name, "") for name in COLUMNS[4:]), flush=True)
    common.write_csv(RESULTS, common.with_ratios(rows), COLUMNS)


def table_of(rows: list[dict]) -> str:
    """Markdown of the CSV, as it was measured."""
    first = rows[0]
    lines = [
        "# A teacher's top-k logits: time and memory on a CPU",
        "",
        "Made by `python benchmarks/bench_topk.py --table` from `benchmarks/results/topk_cpu.csv`; what columns and",
        "providers mean is in that script. T tokens, V vocabulary, E width, k ids kept.",
        "",
        f"Commit {first['commit']}, {first['date']}, {first['device']}, {first['versions']}.",
        "",
        *common.markdown_rows(rows, errors=("error", "tail_error")),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    common.measure_or_tabulate(__doc__, RESULTS, TABLE, one=measure, run_all=run_all, table_of=table_of)
