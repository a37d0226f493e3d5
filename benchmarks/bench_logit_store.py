"""Teachers' records on disk: bytes, error and speed of `LogitStore`, against parquet, vortex and general compressors.

    python benchmarks/bench_logit_store.py           # 5 minutes -> benchmarks/results/{logit_store_cpu,goals}.csv
    python benchmarks/bench_logit_store.py --table   # CSV -> docs/results/logit_store_cpu.md, and prints it
    python benchmarks/bench_logit_store.py --try     # one short sequence; writes nothing

The first command waits until the machine is quiet (load of at most 0.5) and refuses to start if it is not within five
minutes; --busy measures anyway. It needs the quick start's teacher and validation store (`make demo` makes them), and
pip: the peers go into build/logit_store_peers, a virtual environment with the pins of logit_store_peers.txt.

Records: the teacher's distribution, in float32, at 16 sequences of 1,024 tokens. Targets: threshold sampling with tau0
(ids with p >= tau0, and ceil(rest / tau0) systematic draws from the others, which share the rest), and random sampling
(24 independent draws, as in the literature; about 12 distinct ids). target_error: mean over positions of the squared
distance between the target as it is read back and the teacher's distribution.

Rows: `write` is encoding and writing, per sequence; `read` is reading and decoding one sequence of 1,024 tokens at
random from files in the page cache; `target` is `read` plus making padded tensors. Peers (logit_store_peers.py) hold
the same records, those of HEADLINE, and every provider's reads are compared with what was written. One thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring as common
import numpy as np
import torch
from bench_import import wait_until_quiet, write_goals
from logit_store_peers import READS
from measuring import ROOT

from kdtrain.teacher.stored.codec import ROUNDING, decode, encode, sections
from kdtrain.teacher.stored.logit_store import LogitStore, StoreIdentity
from kdtrain.teacher.stored.records import RecordFields, SequenceRecords

RESULTS, GOALS = ROOT / "benchmarks/results/logit_store_cpu.csv", ROOT / "benchmarks/results/goals.csv"
TABLE = ROOT / "docs/results/logit_store_cpu.md"
COLUMNS = ("commit", "date", "device", "versions", "task", "shape", "provider", "mode", "median_ms", "p20_ms", "p80_ms")
COLUMNS = (*COLUMNS, "bytes_per_token", "ids_per_token", "target_error", "fields", "load", "absent")
COMMAND = "python benchmarks/bench_logit_store.py"
TEACHER, TOKENS = ROOT / ".quickstart/teacher", ROOT / ".quickstart/data/validation"
PEERS = Path(__file__).with_name("logit_store_peers.txt")
SEQUENCES, SEQ_LEN = 16, 1024
THRESHOLDS, DRAWS = (12, 16, 20, 24, 32), 24
HEADLINE, RANDOM = "threshold 1/24", f"random sampling, {DRAWS} draws"
CHUNK = 256
"""Positions that are sampled at a time."""


def log_probs(sequences: int, seq_len: int):
    """Log-probabilities [S, V] of the teacher and the labels [S] of each sequence."""
    from kdtrain.data import TokenStore
    from kdtrain.data.packing import PackingSpec, pack, stack
    from kdtrain.distributed.mesh import Mesh
    from kdtrain.models import ModelSpec, load_backbone

    for folder in (TEACHER, TOKENS):
        if not folder.exists():
            raise SystemExit(f"{folder} does not exist; run `make demo` first")
    store, packing = TokenStore.open(TOKENS), PackingSpec(seq_len)
    spec = ModelSpec(weights=str(TEACHER), dtype="float32", seq_len=seq_len)
    teacher = load_backbone(spec, Mesh(), vocab_size=store.manifest.vocab_size, trainable=False)
    head = teacher.lm_head_shard
    for number in range(sequences):
        batch = stack([pack(store, number, packing)], [number])
        with torch.no_grad():
            logits = teacher.hidden_states(batch) @ head.weight[: store.manifest.vocab_size].T
            yield logits.log_softmax(-1), batch.labels.flatten()


class Sorted:
    """Distributions [C, V] with what every threshold needs: largest ids and probabilities, distribution functions."""

    def __init__(self, log_p: torch.Tensor) -> None:
        p = log_p.double().softmax(-1)
        top, ids = p.topk(min(2 * max(THRESHOLDS) + 1, p.shape[1]), dim=1)
        self.top, self.ids, self.cdf = top.numpy(), ids.numpy(), p.cumsum(1).numpy()

    def threshold_rows(self, tau0: float, rng: np.random.Generator) -> list[tuple]:
        """Per position: (kept ids, their probabilities, drawn ids, probability of the rest)."""
        return [self._row(row, tau0, offset) for row, offset in enumerate(rng.random(len(self.top)))]

    def _row(self, row: int, tau0: float, offset: float) -> tuple:
        top, cdf = self.top[row], self.cdf[row]
        rest = cdf[-1] - np.append(0.0, top.cumsum())
        above = int((top >= tau0).sum())
        total = above + math.ceil(rest[above] / tau0 - 1e-9)
        left = total - np.arange(len(top))
        below = (top * left < rest[:-1]) | (left <= 0)
        kept = int(below.argmax()) if below.any() else total
        ids, weights, draws = self.ids[row, :kept], top[:kept], total - kept
        if draws == 0:
            return ids, weights, ids[:0], 0.0
        # in the distribution function of the other ids, each kept one is a step that is skipped
        order = ids.argsort()
        skipped = np.append(0.0, weights[order].cumsum())
        steps = cdf[ids[order]] - skipped[1:]
        places = (offset + np.arange(draws)) / draws * rest[kept]
        places += skipped[np.searchsorted(steps, places, side="right")]
        drawn = np.searchsorted(cdf, places, side="right").clip(max=len(cdf) - 1)
        return ids, weights, drawn, float(rest[kept])


def random_rows(log_p: torch.Tensor, rng: torch.Generator) -> list[tuple]:
    """As `Sorted.threshold_rows`, without kept ids; drawn ids may occur several times."""
    drawn = torch.multinomial(log_p.exp(), DRAWS, replacement=True, generator=rng).numpy()
    none = np.zeros(0, dtype=np.int64)
    return [(none, none.astype(float), ids, 1.0) for ids in drawn]


def records_of(rows: list[tuple], fields: RecordFields, log_p: torch.Tensor, labels: torch.Tensor) -> SequenceRecords:
    """The records of a sequence from its rows."""
    drawn = [np.unique(ids, return_counts=True) for _, _, ids, _ in rows]
    return SequenceRecords(
        kept=np.array([len(row[0]) for row in rows]),
        kept_ids=np.concatenate([row[0] for row in rows]),
        kept_weights=np.concatenate([row[1] for row in rows]).astype(np.float32),
        drawn=np.array([len(ids) for ids, _ in drawn]),
        drawn_ids=np.concatenate([ids for ids, _ in drawn]),
        counts=np.concatenate([counts for _, counts in drawn]) if fields.draws == "counts" else None,
        rest=np.array([row[3] for row in rows], dtype=np.float32),
        label_log_prob=log_p.gather(1, labels[:, None].clamp(min=0))[:, 0].numpy(),
        entropy=-(log_p.exp() * log_p).sum(1).numpy(),
    )


def squared_error(records: SequenceRecords, fields: RecordFields, log_p: torch.Tensor) -> float:
    """Mean over positions of the squared distance of the stored target from the distribution."""
    target = records.to_target(fields)
    p = log_p.exp()
    at = p.gather(1, target.ids.long().clamp(min=0)) * (target.ids >= 0)
    return float((p.square().sum(1) + (target.weights * (target.weights - 2 * at)).sum(1)).double().mean())


def capture(sequences: int, seq_len: int) -> tuple[dict[str, RecordFields], dict, dict[str, float]]:
    """Fields, records of all sequences and mean error of the stored records, by target."""
    fields, records, errors = {}, {}, {}
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for log_p, labels in log_probs(sequences, seq_len):
        rows: dict[str, list[tuple]] = {}
        for part in log_p.split(CHUNK):
            sorted_part = Sorted(part)
            for inverse in THRESHOLDS:
                rows.setdefault(f"threshold 1/{inverse}", []).extend(sorted_part.threshold_rows(1 / inverse, rng))
            rows.setdefault(RANDOM, []).extend(random_rows(part, generator))
        for name, sampled in rows.items():
            counts = {"draws": "counts", "samples": DRAWS} if name == RANDOM else {"draws": "equal"}
            fields[name] = RecordFields(log_p.shape[1], **counts)
            made = records_of(sampled, fields[name], log_p, labels)
            stored = decode(encode(made, fields[name]), fields[name])
            records.setdefault(name, []).append(stored)
            errors[name] = errors.get(name, 0.0) + squared_error(stored, fields[name], log_p) / sequences
        print(f"captured {len(records[RANDOM])} of {sequences} sequences", flush=True)
    return fields, records, errors


def store_times(fields: RecordFields, records: list[SequenceRecords], folder: Path) -> tuple[dict[str, list], int]:
    """Seconds of writing and of random reads, and bytes of the folder. SystemExit if a read is wrong."""
    identity = StoreIdentity(
        **{"corpus": "", "packing": {}, "tokenizer": "", "teacher": {}, "target": {}, "forward": {}},
        **{"temperature": 1.0, "seed": 0, "fields": fields},
    )
    times: dict[str, list] = {"write": [], "read": [], "target": []}
    with LogitStore.create(folder, identity) as writer:
        for first in range(0, len(records), 8):
            start = time.perf_counter()
            writer.add(first, records[first : first + 8])
            times["write"].append((time.perf_counter() - start) / len(records[first : first + 8]))
    store, order = LogitStore.open(folder), random.Random(0)
    for key, given in enumerate(records):
        found = store[key]
        exact = [np.array_equal(getattr(found, name), getattr(given, name)) for name in ("kept_ids", "drawn_ids")]
        if not all(exact) or not np.allclose(found.kept_weights, given.kept_weights, rtol=2 * ROUNDING):
            raise SystemExit(f"sequence {key} is read back wrong")
    for _ in range(READS):
        key = order.randrange(len(records))
        start = time.perf_counter()
        found = store[key]
        times["read"].append(time.perf_counter() - start)
        found.to_target(fields)
        times["target"].append(time.perf_counter() - start)
    return times, sum(path.stat().st_size for path in folder.iterdir())


def peer_answers(records: list[SequenceRecords], vocab_size: int, folder: Path) -> list[dict]:
    """What logit_store_peers.py prints, one per provider."""
    arrays: dict[str, np.ndarray] = {"sequences": np.array(len(records))}
    narrow = np.min_scalar_type(vocab_size - 1)
    for number, one in enumerate(records):
        ids = one.to_target(RecordFields(vocab_size, draws="equal")).ids.numpy()
        with np.errstate(divide="ignore"):
            halves = {"weights": np.log(one.kept_weights), "rest": np.log(one.rest)}
        halves |= {"label": one.label_log_prob, "entropy": one.entropy}
        columns = {"kept": one.kept.astype(np.uint8), "drawn": one.drawn.astype(np.uint8)}
        columns |= {"ids": ids[ids >= 0].astype(narrow)}
        columns |= {name: values.astype(np.float16) for name, values in halves.items()}
        arrays |= {f"{name}_{number}": values for name, values in columns.items()}
    np.savez(folder / "records.npz", **arrays)
    script = Path(__file__).with_name("logit_store_peers.py")
    command = [peers_python(), script, folder / "records.npz", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def peers_python() -> Path:
    """The interpreter of the peers' virtual environment, which is made if there is none with these pins."""
    folder = ROOT / "build/logit_store_peers"
    if not (folder / "pins").exists() or (folder / "pins").read_bytes() != PEERS.read_bytes():
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", "-r", PEERS], check=True)
        (folder / "pins").write_bytes(PEERS.read_bytes())
    return folder / "bin/python"


def field_bytes(fields: RecordFields, records: list[SequenceRecords]) -> str:
    """Bytes per token of each part of a record."""
    totals: dict[str, int] = {}
    for one in records:
        for name, data in sections(one, fields).items():
            totals[name] = totals.get(name, 0) + len(data)
    tokens = sum(map(len, records))
    return ", ".join(f"{name} {size / tokens:.2f}" for name, size in totals.items())


def measure_all(folder: Path, sequences: int, seq_len: int) -> list[dict]:
    """All rows: every target in `LogitStore`, then the headline's records in the peers."""
    torch.set_num_threads(1)
    base = {"commit": common.current_commit(), "date": common.today(), "load": f"{os.getloadavg()[0]:.2f}"}
    base |= {"device": f"{common.cpu_name()}, one thread", "absent": "", "task": "logit_store"}
    fields, records, errors = capture(sequences, seq_len)
    rows, tokens = [], sequences * seq_len
    versions = f"python {sys.version.split()[0]} numpy {np.__version__} torch {torch.__version__}"
    for name in records:
        ids = sum(len(one.kept_ids) + len(one.drawn_ids) for one in records[name]) / tokens
        common_columns = {"shape": f"{name}, S={seq_len} V={fields[name].vocab_size}", "ids_per_token": f"{ids:.2f}"}
        common_columns |= {"target_error": f"{errors[name]:.4f}"}
        times, size = store_times(fields[name], records[name], folder / name.replace("/", "_"))
        for mode, seconds in times.items():
            row = {**base, **common_columns, "versions": versions, "provider": "LogitStore", "mode": mode}
            row |= {**common.percentiles(seconds), "bytes_per_token": f"{size / tokens:.2f}"}
            rows.append(row | {"fields": field_bytes(fields[name], records[name])})
        if name != HEADLINE:
            continue
        for answer in peer_answers(records[name], fields[name].vocab_size, folder):
            for mode, seconds in (("write", [answer["written_s"] / len(records[name])]), ("read", answer["times"])):
                row = {**base, **common_columns, "versions": answer["versions"], "provider": answer["provider"]}
                row |= {**common.percentiles(seconds), "mode": mode, "fields": answer["note"]}
                rows.append(row | {"bytes_per_token": f"{answer['bytes'] / tokens:.2f}"})
    return rows


def find(rows: list[dict], target: str, provider: str, mode: str) -> dict:
    """The row of a target, provider and mode."""
    return next(
        r for r in rows if r["shape"].startswith(target + ",") and (r["provider"], r["mode"]) == (provider, mode)
    )


def goals_of(rows: list[dict]) -> list[dict]:
    """Rows of goals.csv."""
    mine = find(rows, HEADLINE, "LogitStore", "read")
    peers = ("parquet + zstd", "parquet + zstd, the same, tuned")
    speedups = [float(find(rows, HEADLINE, peer, "read")["median_ms"]) / float(mine["median_ms"]) for peer in peers]
    error = float(mine["target_error"]) / float(find(rows, RANDOM, "LogitStore", "read")["target_error"])
    figures = (
        ("logit_store_bytes_per_token", mine["bytes_per_token"], "36", "lower"),
        ("logit_store_error_of_random_sampling", f"{error:.3f}", "1", "lower"),
        ("logit_store_read_ms_1024", mine["median_ms"], "2", "lower"),
        ("logit_store_read_speedup_over_parquet_defaults", f"{speedups[0]:.3g}", "5", "higher"),
        ("logit_store_read_speedup_over_parquet_tuned", f"{speedups[1]:.3g}", "5", "higher"),
    )
    about = {"commit": mine["commit"], "date": mine["date"], "command": COMMAND}
    return [{"name": n, "measured": m, "goal": g, "better": b, **about} for n, m, g, b in figures]


def table_of(rows: list[dict]) -> str:
    """The page of results."""
    lines = [
        "# Teachers' records on disk",
        "",
        f"Made by `{COMMAND} --table` from `benchmarks/results/logit_store_cpu.csv`; what columns and providers mean: "
        "`benchmarks/bench_logit_store.py`.",
        "",
        f"{rows[0]['device']}, load {rows[0]['load']} at the beginning, commit {rows[0]['commit']}, {rows[0]['date']}.",
        "Times are per sequence of 1,024 tokens; those of a run with a load above 0.5 are not for comparison.",
        "",
        "| target | provider | bytes a token | ids a token | error | write ms | read ms | read and tensors ms |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    by_key = {(row["shape"], row["provider"], row["mode"]): row for row in rows}
    for row in rows:
        if row["mode"] == "read":
            modes = (by_key.get((row["shape"], row["provider"], mode)) for mode in ("write", "read", "target"))
            cells = " | ".join("" if found is None else found["median_ms"] for found in modes)
            lines.append(
                f"| {row['shape'].partition(', S=')[0]} | {row['provider']} | {row['bytes_per_token']} "
                f"| {row['ids_per_token']} | {row['target_error']} | {cells} |"
            )
    fields = [row for row in rows if row["mode"] == "read" and row["fields"]]
    lines += ["", "Bytes a token of each part of a record, and what else a format needs:", ""]
    lines += ["| target | provider | parts |", "| --- | --- | --- |"]
    lines += [f"| {row['shape'].partition(', S=')[0]} | {row['provider']} | {row['fields']} |" for row in fields]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table from the CSV instead of measuring")
    parser.add_argument("--busy", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--try", dest="trial", action="store_true", help="one short sequence; writes nothing")
    arguments = parser.parse_args()
    if arguments.table:
        text = table_of(common.read_csv(RESULTS, COMMAND))
        common.write_whole(TABLE, text)
        print(text, end="")
        return
    if not (arguments.busy or arguments.trial):
        wait_until_quiet()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(Path(folder), *((1, 256) if arguments.trial else (SEQUENCES, SEQ_LEN)))
    goals = goals_of(rows)
    if arguments.trial:
        print(table_of(rows), *(f"{goal['name']} {goal['measured']}" for goal in goals), sep="\n")
        return
    common.write_csv(RESULTS, rows, COLUMNS)
    write_goals(GOALS, goals)


if __name__ == "__main__":
    main()
