"""Time and peak memory of losses on hidden states, on this CPU, against usual formulas and published packages.

    python benchmarks/bench_loss_head.py            # measures, 15 minutes -> benchmarks/results/loss_head_cpu.csv
    python benchmarks/bench_loss_head.py --table    # CSV -> docs/results/loss_head_cpu.md, and prints it
    git worktree add /tmp/base COMMIT
    python benchmarks/bench_loss_head.py --base /tmp/base   # -> benchmarks/results/cpu_loss_pair.csv, goals.csv

The first command alone regenerates the results; the last compares the streamed losses of two checkouts, the goal being
that below 1,024 tokens (benchmarks/loss_pair.py; --busy measures at any load, --try measures one shape once and writes
nothing). float32; student width 256, teacher width 576. Tasks and providers:
benchmarks/loss_providers.py; packages that are not installed are listed as absent, with the reason. Every number comes
from a fresh process, so that no provider inherits another's memory.

Modes: train is the loss and the gradients of student hidden states and head; eval is the loss under no_grad.
Before anything is timed, the provider's loss and gradients at this very shape are compared with float64; gradient_error
is the worse of the two relative errors. A provider further off than 1e-4 is not timed and marked in its row; if it is
kdtrain's own, nothing is written. peak_bytes: growth of the process's resident memory during one run at this shape
(VmHWM of /proc/self/status, reset just before, less VmRSS then; Linux only). It contains the returned gradients and
whatever the matrix products allocate. Times: median, 20th and 80th percentile of the runs after that one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring as common
from measuring import ROOT

RESULTS = ROOT / "benchmarks/results/loss_head_cpu.csv"
TABLE = ROOT / "docs/results/loss_head_cpu.md"
WIDTH_S, WIDTH_T = 256, 576
VOCAB = 50257
MAIN = "streamed-128MiB"
OURS_AND_FORMS = (MAIN, "naive", "chunked")
TOKENS = (256, 512, 1024, 4096)
VOCABS, TOKENS_OF_VOCABS = (8192, 32768), 512
PEER_TOKENS = 512
AGREEMENT = 1e-4


def jobs() -> list[dict]:
    """What is measured, in order: tokens at one vocabulary, vocabularies at fixed tokens, evaluation, peers."""

    def job(tokens: int, vocab: int, provider: str, mode: str = "train", task: str = "kl_ce") -> dict:
        return {"tokens": tokens, "vocab": vocab, "provider": provider, "mode": mode, "task": task}

    found = [job(tokens, VOCAB, name) for tokens in TOKENS for name in (*OURS_AND_FORMS, "compiled")]
    found += [job(TOKENS_OF_VOCABS, vocab, name) for vocab in VOCABS for name in OURS_AND_FORMS]
    found.append(job(1024, VOCAB, "streamed-1GiB"))
    found += [job(1024, VOCAB, name, "eval") for name in OURS_AND_FORMS]
    for task, peers in PEERS.items():
        names = (*OURS_AND_FORMS, "compiled", *peers)
        found += [job(PEER_TOKENS, VOCAB, name, task=task) for name in names]
    return found


PEERS = {
    "kl": ("torchtune", "modelopt", "liger"),
    "jsd": ("trl", "liger-chunked", "liger"),
    "ce": ("torch-linear-ce", "cut-ce-compile", "cut-ce", "liger"),
}


def shape_of(job: dict) -> str:
    return f"T={job['tokens']} V={job['vocab']} D={WIDTH_S} E={WIDTH_T}"


def inputs(tokens: int, vocab: int, train: bool) -> tuple:
    """Random hidden states, heads with logits of standard deviation 1.5, and labels; the same for every provider."""
    import torch

    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    head_s, head_t = normal(vocab, WIDTH_S) * 1.5 / WIDTH_S**0.5, normal(vocab, WIDTH_T) * 1.5 / WIDTH_T**0.5
    hidden_s, hidden_t = normal(tokens, WIDTH_S), normal(tokens, WIDTH_T)
    labels = torch.randint(vocab, (tokens,), generator=rng)
    return hidden_s.requires_grad_(train), head_s.requires_grad_(train), hidden_t, head_t, labels


def run(loss_of: Callable, arguments: tuple, train: bool) -> tuple:
    """(loss, gradients of the first two arguments)."""
    import torch

    with torch.set_grad_enabled(train):
        loss = loss_of(*arguments)
    return loss.detach(), list(torch.autograd.grad(loss, arguments[:2])) if train else []


def measure(job: dict) -> dict:
    """One job in this process: check correctness, then measure memory, then times.

    `save`: only write the float64 answer there.
    """
    import loss_providers as providers
    import torch

    train = job["mode"] == "train"
    arguments = inputs(job["tokens"], job["vocab"], train)
    if "save" in job:
        torch.save(providers.float64_answer(job["task"], arguments), job["save"])
        return {}
    provider = providers.find(job["task"], job["provider"])
    if reason := provider.absent("cpu"):
        return {"versions": provider.versions() if not provider.packages else "", "absent": reason}
    loss, gradients = run(provider.loss, arguments, train)
    expected = torch.load(job["expected"], weights_only=True)
    errors = providers.errors_of(provider, loss, gradients, expected[: 1 + len(gradients)])
    answer = {"versions": provider.versions(), "threads": torch.get_num_threads(), **errors}
    del gradients, expected
    if not max(errors.values()) <= AGREEMENT:
        return {**answer, "absent": f"wrong: value error {errors['value_error']:.1e}"}
    measured = common.peak_and_times(lambda: run(provider.loss, arguments, train))
    return {**answer, **measured}


def row_of(job: dict, answer: dict, commit: str) -> dict:
    row = {
        "commit": commit,
        "date": common.today(),
        "device": f"{common.cpu_name()}, {answer.get('threads', 0)} threads",
        "versions": answer["versions"],
        "task": job["task"],
        "shape": shape_of(job),
        "provider": job["provider"],
        "mode": job["mode"],
        "absent": answer.get("absent", ""),
    }
    if row["absent"]:
        return row
    error = f"{answer['gradient_error']:.1e}" if job["mode"] == "train" else ""
    return {
        **row,
        **common.percentiles(answer["times"]),
        "peak_bytes": answer["peak_bytes"],
        "gradient_error": error,
    }


def run_all() -> None:
    commit, rows = common.current_commit(), []
    with tempfile.TemporaryDirectory(prefix="bench_loss_head_") as folder:
        for job in jobs():
            expected = Path(folder) / f"{job['task']}_{job['tokens']}_{job['vocab']}.pt"
            if not expected.exists():
                for old in Path(folder).iterdir():
                    old.unlink()
                common.in_fresh_process(__file__, {**job, "mode": "train", "save": str(expected)})
            answer = common.in_fresh_process(__file__, {**job, "expected": str(expected)})
            rows.append(row_of(job, answer, commit))
            if rows[-1]["absent"] and job["provider"].startswith("streamed"):
                raise SystemExit(f"{job}: {rows[-1]['absent']}")
            print(*(rows[-1].get(name, "") for name in common.COLUMNS[4:]), flush=True)
    common.write_csv(RESULTS, common.with_ratios(rows))


def notes_on(rows: list[dict]) -> list[str]:
    """Notes on the providers in these rows, one line each."""
    import loss_providers as providers

    named = dict.fromkeys((row["task"], row["provider"]) for row in rows)
    found = [providers.find(task, name) for task, name in named]
    return [f"`{provider.name}`: {provider.note}." for provider in found if provider.note]


def table_of(rows: list[dict]) -> str:
    """Markdown of the CSV, as it was measured."""
    first = rows[0]
    packages = sorted({row["versions"] for row in rows if row["versions"]}, key=len)
    lines = [
        "# Losses on hidden states: time and memory on a CPU",
        "",
        "Made by `python benchmarks/bench_loss_head.py --table` from `benchmarks/results/loss_head_cpu.csv`; what the",
        "columns mean is in that script, what tasks and providers are in `benchmarks/loss_providers.py`.",
        "T tokens, V vocabulary, D and E widths of student and teacher.",
        "",
        f"Commit {first['commit']}, {first['date']}, {first['device']}; {'; '.join(packages)}.",
        "",
        *common.markdown_rows(rows),
        "",
        *notes_on(rows),
    ]
    return "\n".join(lines) + "\n"


def compare(arguments: argparse.Namespace) -> None:
    """Measure the streamed losses of this checkout beside those of another one; write them and the goal."""
    import loss_pair
    from bench_import import wait_until_quiet, write_goals

    if arguments.trial:
        loss_pair.compare(arguments.base, loss_pair.SHAPES[:1], runs=1)
        return
    if not arguments.busy:
        wait_until_quiet()
    rows = loss_pair.compare(arguments.base, loss_pair.SHAPES)
    goal = loss_pair.goal_of(rows)
    common.write_csv(loss_pair.RESULTS, rows, loss_pair.COLUMNS)
    write_goals(loss_pair.GOALS, [goal])
    print(goal["name"], goal["measured"], f"(goal {goal['goal']}, {goal['better']} is better)")


def main() -> None:
    """--base compares two checkouts; everything else is as in the other benchmarks."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--base", type=Path, metavar="PATH")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--try", dest="trial", action="store_true")
    arguments, _ = parser.parse_known_args()
    if arguments.base is not None:
        compare(arguments)
    else:
        common.measure_or_tabulate(__doc__, RESULTS, TABLE, one=measure, run_all=run_all, table_of=table_of)


if __name__ == "__main__":
    main()
