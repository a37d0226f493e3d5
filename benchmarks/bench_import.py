"""Megatron pairs to token stores: opened in place, and copied in blocks against document by document.

    python benchmarks/bench_import.py             # measures, 3 minutes -> benchmarks/results/{cpu_import,goals}.csv
    python benchmarks/bench_import.py --try 2e6   # measures small pairs and writes nothing

The first command waits until the machine is quiet (load of at most 0.5) and refuses to start if it is not within five
minutes; --busy measures anyway. The tokenizer is a byte-level BPE of 32,000 tokens trained on the demo's text, the
pairs repeat that text in documents of about 500 tokens, uint16. Every number comes from a fresh process, with its pair
in the page cache. Rows:

in place   import_megatron(in_place=True) and TokenStore.open of the result: every token is read, none copied
blocks     import_megatron, in threads
naive      one document at a time in one process, decoded to measure its text (what kdtrain did up to 8dc14f3)

The copied stores must equal the naive one byte for byte, and the store in place must have the same fingerprint and
manifest but for its link. peak_bytes: growth of resident memory, the mapped pair included. load: when the script began.
The speed-up is that of tokens per second: blocks at the size of the naive row.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import lzma
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring as common
import numpy as np
from measuring import ROOT

RESULTS, GOALS = ROOT / "benchmarks/results/cpu_import.csv", ROOT / "benchmarks/results/goals.csv"
COLUMNS = ("commit", "date", "device", "versions", "task", "shape", "provider", "median_s", "p20_s", "p80_s")
COLUMNS = (*COLUMNS, "tokens_per_s", "peak_bytes", "load")
GOAL_COLUMNS = ("name", "measured", "goal", "better", "commit", "date", "command")
COMMAND = "python benchmarks/bench_import.py"
OPEN_TOKENS, COPY_TOKENS, DOCUMENT_TOKENS, VOCAB = 10**8, 2 * 10**7, 500, 32000
MAX_LOAD, QUIET_WITHIN_S = 0.5, 300.0
RUNS = 5


def write_tokenizer(folder: Path) -> np.ndarray:
    """A byte-level BPE trained on the demo's text; the ids of that text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    files = sorted((ROOT / "kdtrain/assets/demo").glob("*.jsonl.xz"))
    lines = (line for file in files for line in lzma.decompress(file.read_bytes()).splitlines())
    texts = [json.loads(line)["text"] for line in lines]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": VOCAB, "initial_alphabet": alphabet, "special_tokens": ["<|endoftext|>"]}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, **options))
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return np.concatenate([np.asarray(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch_fast(texts)])


def write_pair(prefix: Path, ids: np.ndarray, tokens: int) -> None:
    """`tokens` tokens of `ids`, repeated, with a separator about every DOCUMENT_TOKENS."""
    from kdtrain.data.megatron_index import index_bytes

    stream = np.resize(ids, tokens)
    borders = np.random.default_rng(0).integers(0, tokens, tokens // DOCUMENT_TOKENS)
    ends = np.unique(np.append(borders, tokens - 1))
    stream[ends] = 0
    stream.tofile(prefix.with_name(prefix.name + ".bin"))
    index = index_bytes(np.diff(ends, prepend=-1), np.dtype(np.uint16))
    prefix.with_name(prefix.name + ".idx").write_bytes(index)


def naive(prefix: Path, tokenizer_dir: Path, output: Path) -> None:
    """For each document: cut off the separator, decode to measure the text, write."""
    from kdtrain.data.megatron_index import read_index
    from kdtrain.data.separator import separator_id
    from kdtrain.data.token_store import TokenStoreWriter
    from kdtrain.data.tokenizer import document_prefix, load_tokenizer

    tokenizer, end, begin = load_tokenizer(tokenizer_dir), separator_id(tokenizer_dir), document_prefix(tokenizer_dir)
    index = read_index(prefix.with_name(prefix.name + ".idx"))
    tokens = np.memmap(prefix.with_name(prefix.name + ".bin"), mode="r", dtype=index.dtype)
    edges = np.append(index.pointers, index.num_tokens * index.dtype.itemsize) // index.dtype.itemsize
    with TokenStoreWriter(
        output / "train", tokenizer_dir, end, source=f"Megatron {prefix.name}", document_prefix=begin
    ) as writer:
        for first, last in zip(edges[index.documents[:-1]], edges[index.documents[1:]], strict=True):
            ids = np.asarray(tokens[first:last])
            if len(ids) == 0:
                continue
            ids = ids[:-1] if ids[-1] == end else ids
            ids = ids[len(begin) :] if begin and ids[: len(begin)].tolist() == begin else ids
            text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            writer.add(ids, len(text.encode()))
        writer.commit()


def call_of(job: dict) -> Callable[[Path], object]:
    """What a job measures, given a folder for its store."""
    from kdtrain.data.import_megatron import MegatronSettings, import_megatron
    from kdtrain.data.token_store import TokenStore

    prefix, tokenizer = Path(job["prefix"]), Path(job["tokenizer"])
    if job["provider"] == "naive":
        return lambda output: naive(prefix, tokenizer, output)
    settings = MegatronSettings(in_place=job["provider"] == "in place")

    def run(output: Path) -> object:
        import_megatron([prefix], tokenizer, output, settings)
        return TokenStore.open(output / "train")

    return run


def measure(job: dict) -> dict:
    """times and peak_bytes of a job, in this process; its last store stays at job["output"]."""
    import platform

    import tokenizers

    run, output, times = call_of(job), Path(job["output"]), []
    before = common.reset_peak()
    for _ in range(job["runs"]):
        shutil.rmtree(output, ignore_errors=True)
        start = time.perf_counter()
        run(output)
        times.append(time.perf_counter() - start)
    versions = f"python {platform.python_version()} numpy {np.__version__} tokenizers {tokenizers.__version__}"
    return {"times": times, "peak_bytes": common.memory("VmHWM") - before, "versions": versions}


def check_equal(folder: Path) -> None:
    """Both copies byte for byte, and the store in place but for its link. SystemExit names the file that differs."""
    stores = {name: folder / name / "train" for name in ("naive", "blocks", "in place")}
    for file in sorted(path.relative_to(stores["naive"]) for path in stores["naive"].rglob("*") if path.is_file()):
        expected = (stores["naive"] / file).read_bytes()
        if (stores["blocks"] / file).read_bytes() != expected:
            raise SystemExit(f"blocks: {file} differs from the naive copy's")
        found = (stores["in place"] / file).read_bytes()
        if file.name == "manifest.json":
            content = json.loads(found)
            content.pop("linked")
            found = (json.dumps(content, indent=2) + "\n").encode()
        if found != expected:
            raise SystemExit(f"in place: {file} differs from the naive copy's")


def row_of(job: dict, answer: dict, commit: str, load: float) -> dict:
    times = sorted(answer["times"])
    last, median = len(times) - 1, statistics.median(times)
    return {
        "commit": commit,
        "date": common.today(),
        "device": f"{common.cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "versions": answer["versions"],
        "task": "import_megatron",
        "shape": f"{job['tokens']} tokens of uint16, V={VOCAB}, documents of {DOCUMENT_TOKENS}",
        "provider": job["provider"],
        "median_s": f"{median:.4g}",
        "p20_s": f"{times[round(0.2 * last)]:.4g}",
        "p80_s": f"{times[round(0.8 * last)]:.4g}",
        "tokens_per_s": f"{job['tokens'] / median:.4g}",
        "peak_bytes": answer["peak_bytes"],
        "load": f"{load:.2f}",
    }


def measure_all(folder: Path, open_tokens: int, copy_tokens: int) -> list[dict]:
    """Rows: all three at the smaller size, side by side and compared, then in place and blocks at the larger."""
    commit, load, rows = common.current_commit(), os.getloadavg()[0], []  # before this script causes any
    ids = write_tokenizer(folder / "tokenizer")
    for tokens, providers in ((copy_tokens, ("naive", "blocks", "in place")), (open_tokens, ("blocks", "in place"))):
        prefix = folder / f"pair_{tokens}" / "pair"
        prefix.parent.mkdir(exist_ok=True)
        write_pair(prefix, ids, tokens)
        for provider in providers:
            job = {"prefix": str(prefix), "tokenizer": str(folder / "tokenizer"), "tokens": tokens, "runs": RUNS}
            job |= {"provider": provider, "output": str(folder / str(tokens) / provider)}
            rows.append(row_of(job, common.in_fresh_process(__file__, job), commit, load))
            print(*(rows[-1][name] for name in COLUMNS[5:]), sep="  ", flush=True)
        if "naive" in providers:
            check_equal(folder / str(tokens))
    return rows


def goals_of(rows: list[dict]) -> list[dict]:
    """The two goals as rows of goals.csv."""
    small, large = rows[0]["shape"], rows[-1]["shape"]
    by_key = {(row["shape"], row["provider"]): row for row in rows}
    speedup = float(by_key[small, "blocks"]["tokens_per_s"]) / float(by_key[small, "naive"]["tokens_per_s"])
    found = {
        "import_megatron_in_place_seconds_1e8": (by_key[large, "in place"]["median_s"], "1", "lower"),
        "import_megatron_copy_speedup": (f"{speedup:.4g}", "4", "higher"),
    }
    same = {"commit": rows[0]["commit"], "date": rows[0]["date"], "command": COMMAND}
    return [
        {"name": name, "measured": measured, "goal": goal, "better": better, **same}
        for name, (measured, goal, better) in found.items()
    ]


def write_goals(path: Path, rows: list[dict]) -> None:
    """Replace the rows of these names, keep all others."""
    names = {row["name"] for row in rows}
    kept = [row for row in common.read_csv(path, COMMAND) if row["name"] not in names] if path.exists() else []
    text = io.StringIO()
    writer = csv.DictWriter(text, GOAL_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*kept, *rows])
    common.write_whole(path, text.getvalue())


def wait_until_quiet() -> None:
    """Return when the load is at most MAX_LOAD; SystemExit if it is not within QUIET_WITHIN_S."""
    end = time.monotonic() + QUIET_WITHIN_S
    while (load := os.getloadavg()[0]) > MAX_LOAD:
        if time.monotonic() >= end:
            raise SystemExit(f"the load is {load:.2f}, above {MAX_LOAD}: wait, or publish anyway with --busy")
        time.sleep(5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", action="store_true", help="measure and publish although the machine is busy")
    parser.add_argument("--try", dest="trial", type=float, metavar="TOKENS", help="size of both pairs; writes nothing")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one))))
        return
    if not arguments.busy and arguments.trial is None:
        wait_until_quiet()
    sizes = (OPEN_TOKENS, COPY_TOKENS) if arguments.trial is None else (int(arguments.trial),) * 2
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(Path(folder), *sizes)
    if arguments.trial is None:
        common.write_csv(RESULTS, rows, COLUMNS)
        write_goals(GOALS, goals_of(rows))
    for goal in goals_of(rows):
        print(goal["name"], goal["measured"], f"(goal {goal['goal']}, {goal['better']} is better)")


if __name__ == "__main__":
    main()
