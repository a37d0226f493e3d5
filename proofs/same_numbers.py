"""Whether two checkouts of this repository compute the same numbers, bit for bit.

    sh launch/quickstart.sh                                # once: the demo's teacher
    git worktree add ../before COMMIT
    python proofs/same_numbers.py ../before                # -> docs/results/same_numbers.md

Both run with the packages of the interpreter at hand, one after the other, each with its own code: the demo's corpus is
prepared, both demo runs take their first steps (tensor parallelism 2), and a tiny teacher is distilled in the layouts
of `TINY`, one of which is also continued from its own checkpoint. Compared are all losses, gradient norms and
evaluations as metrics.jsonl has them, what the console says of teacher and loss before the first step, and the bytes of
stores and exported weights. Exit code 1 if anything differs. About 6 minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs/results/same_numbers.md"
TEACHER = ROOT / ".quickstart/teacher"
METRICS = ("loss/", "distill/", "eval/", "optim/")
LOGGED = ("check", "prefix", "loss")
FILES = ("*.bin", "*.idx", "*.safetensors", "config.json", "tokenizer.json")
DEMO_STEPS, DEMO_STEP = 4, 2048
SETTINGS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
MAKE_TINY = """
import sys
from pathlib import Path
from kdtrain.models.tiny import tiny_config
from tests.support.tiny_data import random_documents, write_store
from tests.support.tiny_run import write_run

folder = Path(sys.argv[1])
write_run(
    folder, student=tiny_config("qwen3"), teacher=tiny_config("llama"), steps=8,
    data={"validation": str(folder / "validation")}, eval={"every_steps": 4, "max_tokens": 512}, zero={"stage": 2},
    checkpoint={"export": True, "keep_every": 4},
)
write_store(folder / "validation", random_documents(40, seed=1), folder / "teacher")
"""
SHARED = ("teacher.layout=tp", "teacher.tp=2", "zero.stage=1", "data.sequences_per_micro_batch=2")
TINY = {
    "tp 2 x dp 2, ZeRO 2, bfloat16": ("parallel.tp=2", "student.dtype=bfloat16", "teacher.dtype=bfloat16"),
    "dp 4, replicas share a teacher of tp 2": SHARED,
    "dp 2, dedicated teacher of tp 2": ("teacher.layout=dedicated", "teacher.ranks=2", "teacher.tp=2"),
    "cp 2 x dp 2, ZeRO 3, plain teacher under ZeRO 3": ("parallel.cp=2", "zero.stage=3", "teacher.zero_stage=3"),
    "dp 4, replicas share a teacher of tp 2, resumed at step 4": (
        *SHARED,
        "run.resume={runs}/1/checkpoints/step_000004",
    ),
}
"""Name -> settings of a tiny run of 8 steps on four ranks. runs: the folder of these runs, which are named 0, 1, ..."""
Numbers = dict[str, str]
"""What was computed, by name, as text that is equal only if the bits are."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="checkout to compare this one with")
    base = parser.parse_args().base.resolve()
    if not (TEACHER / "config.json").is_file():
        parser.error(f"{TEACHER.relative_to(ROOT)} is missing: run sh launch/quickstart.sh first")
    with tempfile.TemporaryDirectory() as name:
        before, after = (numbers(checkout, Path(name) / place) for checkout, place in ((base, "a"), (ROOT, "b")))
    rows = list(compare(before, after))
    TABLE.write_text(table(commit(base), commit(ROOT), rows), encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))
    return int(any(differing for _, _, differing in rows))


def numbers(checkout: Path, work: Path) -> Numbers:
    """Everything that `checkout` computes, in the folder `work`."""
    work.mkdir()
    data = work / "data"
    corpus = sorted((checkout / "kdtrain/assets/demo").glob("*.jsonl.xz"))
    prepare = ("--tokenizer", TEACHER, "--output", data, "--validation-share", "0.05", *corpus)
    run(checkout, checkout / "launch/prepare_corpus.py", *prepare)
    demo = [
        f"run.output_dir={work}/runs",
        f"teacher.weights={TEACHER}",
        f"data.train=[{data}/train]",
        f"data.validation={data}/validation",
        f"train.total_tokens={DEMO_STEPS * DEMO_STEP}",
        "log.every_steps=1",
    ]
    for name in ("distill", "pretrain"):
        train(checkout, 2, f"configs/demo/{name}_cpu.yaml", f"run.name={name}", *demo)
    run(ROOT, "-c", MAKE_TINY, work / "tiny")  # where its code is has moved; what it writes is read by both
    runs = {f"demo {name}": work / "runs" / name for name in ("distill", "pretrain")}
    for number, (name, settings) in enumerate(TINY.items()):
        words = [word.format(runs=work / "tiny/runs") for word in settings]
        train(checkout, 4, work / "tiny/config.yaml", f"run.name={number}", *words)
        runs[f"tiny {name}"] = work / f"tiny/runs/{number}"
    found = digests(data, "demo corpus")
    for name, folder in runs.items():
        found |= metrics(folder / "metrics.jsonl", name) | measured(folder, name) | digests(folder / "export", name)
    return found


def run(checkout: Path, *words: object) -> None:
    """This interpreter with the code of `checkout`. Ends the program when it fails."""
    paths = os.pathsep.join((str(checkout), str(checkout / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, **SETTINGS}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=checkout, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        output = done.stdout[-3000:] + done.stderr[-3000:]
        sys.exit(f"{' '.join(command)}\nended with {done.returncode} in {checkout}\n{output}")


def train(checkout: Path, ranks: int, *words: object) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks)
    run(checkout, *launcher, checkout / "launch/train.py", *words)


def metrics(file: Path, name: str) -> Numbers:
    """Every compared number of a run: '<name> <key>' -> its values at all steps, all digits."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    keys = sorted({key for line in lines for key in line if key.startswith(METRICS)})
    return {f"{name}: {key}": " ".join(repr(line[key]) for line in lines if key in line) for key in keys}


def measured(folder: Path, name: str) -> Numbers:
    """What the console said of teacher, prefix and loss before the first step: '<name> <first word>' -> lines."""
    lines = (folder / "console.log").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if (word := line.split(" ")[0]) in LOGGED:
            found.setdefault(f"{name}: console, {word}", []).append(line)
    return {key: "\n".join(text) for key, text in found.items()}


def digests(folder: Path, name: str) -> Numbers:
    files = sorted(file for pattern in FILES for file in folder.rglob(pattern))
    if not files:
        sys.exit(f"{folder} holds nothing to compare")
    return {f"{name}: {f.relative_to(folder)}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def compare(before: Numbers, after: Numbers) -> Iterator[tuple[str, int, list[str]]]:
    """(what, numbers compared, names of those that differ); a number that only one has differs."""
    names = sorted(before.keys() | after.keys())
    for what in dict.fromkeys(name.partition(":")[0] for name in names):
        of_it = [name for name in names if name.startswith(what + ":")]
        yield what, len(of_it), [name for name in of_it if before.get(name) != after.get(name)]


def table(before: str, after: str, rows: list[tuple[str, int, list[str]]]) -> str:
    lines = [
        "# The same numbers, before and after",
        "",
        f"Written by `python proofs/same_numbers.py BEFORE`: {before} against {after}, the same packages.",
        "Four steps of each demo run at tp 2, eight of each tiny run on four ranks, with evaluations. Offload, overlap",
        "and other layouts are compared with plain torch by tests/distributed, not here.",
        "",
        "| what | series and files compared | differ |",
        "| --- | ---: | --- |",
    ]
    lines += [f"| {what} | {count} | {', '.join(differing) or 'none'} |" for what, count, differing in rows]
    return "\n".join(lines) + "\n"


def commit(checkout: Path) -> str:
    words = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
