"""Time and peak memory of the distillation loss on hidden states, on this CPU, against two usual formulas.

    python benchmarks/bench_loss_head.py            # measures, 5 minutes -> benchmarks/results/loss_head_cpu.csv
    python benchmarks/bench_loss_head.py --table    # CSV -> docs/results/loss_head_cpu.md, and prints it

The first command alone regenerates the results. Loss: sum of forward KL and cross-entropy over all tokens, at
temperature 1, float32; student width 256, teacher width 576. Every number comes from a fresh process, so that no
provider inherits another's memory. Providers:

streamed   kdtrain.losses.linear_kd_loss, slab_bytes as in its name
naive      both models' [T, V] logits, log_softmax, F.kl_div, F.nll_loss, autograd; written without needless copies
chunked    the naive formula on 8 chunks of the tokens in turn, summed, one backward (as trainers chunk in torch)

Modes: train is the loss and the gradients of student hidden states and head; eval is the loss under no_grad.
peak_bytes: growth of the process's resident memory during the first run at this shape (VmHWM of /proc/self/status,
reset just before, less VmRSS then; Linux only). It contains the returned gradients and whatever the matrix products
allocate. Times: median, 20th and 80th percentile of the runs after that one. All providers of a shape must agree on
loss and gradient norms, or nothing is written.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/loss_head_cpu.csv"
TABLE = ROOT / "docs/results/loss_head_cpu.md"
COLUMNS = (
    *("commit", "date", "device", "versions", "shape", "provider", "mode"),
    *("median_ms", "p20_ms", "p80_ms", "peak_bytes"),
)

WIDTH_S, WIDTH_T = 256, 576
MAIN = "streamed-128MiB"
PROVIDERS = (MAIN, "naive", "chunked")
TOKENS = (512, 1024, 2048, 4096)
VOCAB = 49152
VOCABS, TOKENS_OF_VOCABS = (8192, 16384, 32768, 65536), 512
CHUNKS = 8
MIN_RUNS, MAX_RUNS, RUN_SECONDS = 5, 15, 3.0
AGREEMENT = 1e-4


def jobs() -> list[dict]:
    """What is measured, in order: tokens at one vocabulary, vocabularies at fixed tokens, evaluation, a larger slab."""
    train = [(tokens, VOCAB) for tokens in TOKENS] + [(TOKENS_OF_VOCABS, vocab) for vocab in VOCABS]
    found = [
        {"tokens": tokens, "vocab": vocab, "provider": provider, "mode": "train"}
        for tokens, vocab in train
        for provider in PROVIDERS
    ]
    found.append({"tokens": 2048, "vocab": VOCAB, "provider": "streamed-1GiB", "mode": "train"})
    found += [{"tokens": 2048, "vocab": VOCAB, "provider": provider, "mode": "eval"} for provider in PROVIDERS]
    return found


def shape_of(job: dict) -> str:
    return f"T={job['tokens']} V={job['vocab']} D={WIDTH_S} E={WIDTH_T}"


def provider_loss(provider: str, vocab: int) -> Callable:
    """(hidden_s, head_s, hidden_t, head_t, labels) -> 0-d loss."""
    import torch
    import torch.nn.functional as F

    from kdtrain.dist.vocab import VocabShard
    from kdtrain.losses import linear_kd_loss

    def naive(hidden_s, head_s, hidden_t, head_t, labels):
        log_q = F.log_softmax(hidden_s @ head_s.T, -1)
        with torch.no_grad():
            log_p = F.log_softmax(hidden_t @ head_t.T, -1)
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True) + F.nll_loss(log_q, labels, reduction="sum")

    def chunked(hidden_s, head_s, hidden_t, head_t, labels):
        parts = zip(hidden_s.chunk(CHUNKS), hidden_t.chunk(CHUNKS), labels.chunk(CHUNKS), strict=True)
        return sum(naive(h_s, head_s, h_t, head_t, label) for h_s, h_t, label in parts)

    def streamed(hidden_s, head_s, hidden_t, head_t, labels):
        ones = torch.ones(len(labels))
        return linear_kd_loss(
            hidden_s,
            head_s,
            hidden_t,
            head_t,
            labels,
            divergence="forward_kl",
            kd_weight=ones,
            ce_weight=ones,
            shard=VocabShard.of(vocab),
            slab_bytes={"streamed-128MiB": 1 << 27, "streamed-1GiB": 1 << 30}[provider],
        ).loss

    return {"naive": naive, "chunked": chunked}.get(provider, streamed)


def measure(job: dict) -> dict:
    """One job in this process."""
    import torch

    torch.manual_seed(0)
    tokens, vocab, train = job["tokens"], job["vocab"], job["mode"] == "train"

    def inputs(num_tokens: int, num_ids: int) -> list:
        hidden_s = torch.randn(num_tokens, WIDTH_S, requires_grad=train)
        head_s = (torch.randn(num_ids, WIDTH_S) * 1.5 / WIDTH_S**0.5).requires_grad_(train)
        hidden_t, head_t = torch.randn(num_tokens, WIDTH_T), torch.randn(num_ids, WIDTH_T) * 1.5 / WIDTH_T**0.5
        return [hidden_s, head_s, hidden_t, head_t, torch.randint(num_ids, (num_tokens,))]

    def run(loss_of: Callable, arguments: list) -> tuple[float, list]:
        with torch.set_grad_enabled(train):
            loss = loss_of(*arguments)
        gradients = torch.autograd.grad(loss, arguments[:2]) if train else []
        return float(loss.detach()), list(gradients)

    run(provider_loss(job["provider"], 128), inputs(16, 128))  # libraries' own buffers and threads
    loss_of, arguments = provider_loss(job["provider"], vocab), inputs(tokens, vocab)
    before = reset_peak()
    loss, gradients = run(loss_of, arguments)
    peak = memory("VmHWM") - before
    checks = [loss, *(float(gradient.norm()) for gradient in gradients)]
    del gradients
    times: list[float] = []
    while len(times) < MIN_RUNS or (len(times) < MAX_RUNS and sum(times) < RUN_SECONDS):
        start = time.perf_counter()
        run(loss_of, arguments)
        times.append(time.perf_counter() - start)
    versions = f"python {platform.python_version()} torch {torch.__version__}"
    return {
        "times": times,
        "peak_bytes": peak,
        "checks": checks,
        "versions": versions,
        "threads": torch.get_num_threads(),
    }


def memory(field: str) -> int:
    """Bytes of a kB field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark measures memory on Linux only")


def reset_peak() -> int:
    """Set the process's high-water mark to what it uses now; that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def row_of(job: dict, answer: dict, commit: str) -> dict:
    times = sorted(1000 * t for t in answer["times"])
    last = len(times) - 1
    return {
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{cpu_name()}, {answer['threads']} threads",
        "versions": answer["versions"],
        "shape": shape_of(job),
        "provider": job["provider"],
        "mode": job["mode"],
        "median_ms": f"{statistics.median(times):.1f}",
        "p20_ms": f"{times[round(0.2 * last)]:.1f}",
        "p80_ms": f"{times[round(0.8 * last)]:.1f}",
        "peak_bytes": answer["peak_bytes"],
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def current_commit() -> str:
    """Short hash; + where code that is measured differs from it."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)

    measured = ("kdtrain/losses", "kdtrain/dist", "kernels", "benchmarks/bench_loss_head.py")
    head = git("rev-parse", "--short", "HEAD").stdout.strip()
    return (head or "unknown") + ("+" if git("status", "--porcelain", "--", *measured).stdout else "")


def run_all() -> None:
    commit, rows, agreed = current_commit(), [], {}
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    for job in jobs():
        command = [sys.executable, __file__, "--one", json.dumps(job)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **threads})
        answer = json.loads(done.stdout.splitlines()[-1])
        expected = agreed.setdefault((shape_of(job), job["mode"]), answer["checks"])
        for ours, theirs in zip(answer["checks"], expected, strict=True):
            if not abs(ours - theirs) <= AGREEMENT * abs(theirs):
                raise SystemExit(f"providers disagree at {job}: {answer['checks']} against {expected}")
        rows.append(row_of(job, answer, commit))
        print(*(rows[-1][name] for name in COLUMNS[4:]), flush=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(RESULTS, text.getvalue())


def write_whole(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def table_of(rows: list[dict]) -> str:
    """Markdown: time and memory of every provider, and their ratio to the naive formula at the same shape and mode."""
    naive = {(row["shape"], row["mode"]): row for row in rows if row["provider"] == "naive"}
    first = rows[0]
    lines = [
        "# The loss on hidden states: time and memory on a CPU",
        "",
        "Made by `python benchmarks/bench_loss_head.py --table` from `benchmarks/results/loss_head_cpu.csv`; what the",
        "columns and providers mean is in that script. T tokens, V vocabulary, D and E widths of student and teacher.",
        "",
        f"Commit {first['commit']}, {first['date']}, {first['device']}, {first['versions']}.",
        "",
        "| shape | mode | provider | median ms | p20 - p80 | of naive | peak MiB | of naive |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        other = naive[row["shape"], row["mode"]]
        slower = float(row["median_ms"]) / float(other["median_ms"])
        larger = int(row["peak_bytes"]) / int(other["peak_bytes"])
        lines.append(
            f"| {row['shape']} | {row['mode']} | {row['provider']} | {float(row['median_ms']):.0f} "
            f"| {float(row['p20_ms']):.0f} - {float(row['p80_ms']):.0f} | {slower:.2f} "
            f"| {int(row['peak_bytes']) / 2**20:.0f} | {larger:.2f} |"
        )
    return "\n".join(lines) + "\n"


def write_table() -> None:
    if not RESULTS.exists():
        raise SystemExit(f"{RESULTS} does not exist; run `python benchmarks/bench_loss_head.py` first")
    with RESULTS.open(encoding="utf-8", newline="") as file:
        text = table_of(list(csv.DictReader(file)))
    write_whole(TABLE, text)
    print(text, end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table from the CSV instead of measuring")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one))))
    elif arguments.table:
        write_table()
    else:
        run_all()


if __name__ == "__main__":
    main()
