"""How long saving a checkpoint blocks training: synchronous, and in the background (checkpoint.async_write).

    python benchmarks/bench_checkpoint.py            # measures -> benchmarks/results/cpu_checkpoint.csv (gpu_...)
    python benchmarks/bench_checkpoint.py --table    # CSV -> docs/results/checkpoint_cpu.md, and prints it
    python benchmarks/bench_checkpoint.py --model llama-20m --folder /scratch    # another size, another disk

One process, ZeRO-1, float32, random weights and tokens. After a warm-up, in which the host memory of `behind` is
allocated, rounds of three modes alternate, so that load on the machine affects all alike; medians over the rounds:

alone    steps while nothing is written
at once  `checkpoint.save`: training waits until the checkpoint is on disk
behind   `checkpoint.save_async`: training waits for the copy, and for each stage's agreement after a step

stall_s: seconds training waits. on_disk_s: from the beginning of the save until the checkpoint exists and old ones are
removed, a step's rest included. step_s: of a step meanwhile. first_stall_s: of the warm-up's save.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring as common

TABLES, RESULTS = common.ROOT / "docs/results", common.ROOT / "benchmarks/results"
COLUMNS = (
    *("commit", "date", "device", "versions", "model", "bytes", "mode"),
    *("stall_s", "on_disk_s", "step_s", "first_stall_s", "rounds"),
)
ROUNDS, STEPS = 5, 3
SEQUENCES, SEQ_LEN, VOCAB = 2, 64, 8192


class Bench:
    """An engine that takes steps, and both ways to save its state."""

    def __init__(self, model: str, folder: Path) -> None:
        import torch

        from kdtrain.config.schema import OptimSection, ZeroSection
        from kdtrain.distributed.mesh import Mesh
        from kdtrain.engine import bootstrap
        from kdtrain.engine.background import BackgroundWriter
        from kdtrain.engine.settings import EngineSettings
        from kdtrain.engine.zero import StudentEngine
        from kdtrain.models.load import ModelSpec, load_backbone

        self.rank, self.mesh, self.folder, self.step = bootstrap.start(), Mesh.build(1), folder, 0
        settings = EngineSettings(ZeroSection(), OptimSection(), "float32", SEQUENCES)
        spec = ModelSpec(architecture=model, dtype="float32")
        student = load_backbone(spec, self.mesh, vocab_size=VOCAB, device=self.rank.device, trainable=True)
        self.engine = StudentEngine(student, self.mesh, settings, device=self.rank.device)
        self.writer = BackgroundWriter(self.mesh, self.rank.device)
        self.tokens = torch.randint(VOCAB, (SEQUENCES, SEQ_LEN + 1), device=self.rank.device)

    def train(self) -> float:
        """One step; its seconds."""
        import torch

        from kdtrain.batch import Batch
        from kdtrain.losses import linear_cross_entropy

        began, tokens = time.perf_counter(), self.tokens
        ones = torch.ones(SEQUENCES, SEQ_LEN, device=tokens.device)
        positions = torch.arange(SEQ_LEN, device=tokens.device).expand(SEQUENCES, -1)
        ids = torch.arange(SEQUENCES, device=tokens.device)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, ids)
        parts = self.engine(
            batch,
            lambda hidden, head: linear_cross_entropy(
                hidden,
                head,
                batch.labels.reshape(-1),
                weight=batch.loss_mask.reshape(-1),
                shard=self.engine.backbone.shard,
            ),
        )
        self.engine.backward(parts.loss, SEQUENCES * SEQ_LEN)
        self.engine.step(1e-4)
        self.step += 1
        self.synchronise()
        return time.perf_counter() - began

    def synchronise(self) -> None:
        import torch

        if self.rank.device.type == "cuda":
            torch.cuda.synchronize()

    def at_once(self) -> dict[str, Any]:
        from kdtrain.engine import checkpoint

        began = time.perf_counter()
        path = checkpoint.save(self.folder, self.engine, step=self.step, state={})
        checkpoint.retain(self.folder, 1, just_saved=path, mesh=self.mesh)
        seconds = time.perf_counter() - began
        return {"stall_s": seconds, "on_disk_s": seconds, "steps": [self.train() for _ in range(STEPS)]}

    def behind(self) -> dict[str, Any]:
        from kdtrain.engine import checkpoint, commit

        began = time.perf_counter()
        checkpoint.save_async(
            self.writer,
            self.folder,
            self.engine,
            step=self.step,
            state={},
            prune=lambda saved: commit.remove_older(self.folder, 1, None, saved),
        )
        stall, steps = time.perf_counter() - began, []
        while self.writer.in_flight is not None:
            steps.append(self.train())
            if not self.writer.busy:
                start = time.perf_counter()
                self.writer.advance()
                stall += time.perf_counter() - start
        return {"stall_s": stall, "on_disk_s": time.perf_counter() - began, "steps": steps}

    def alone(self) -> dict[str, Any]:
        return {"stall_s": 0.0, "on_disk_s": 0.0, "steps": [self.train() for _ in range(STEPS)]}


def measure(model: str, folder: Path, rounds: int = ROUNDS) -> tuple[int, dict[str, dict[str, float]]]:
    """Bytes of a checkpoint, and per mode what is in the CSV's columns."""
    from kdtrain.engine import checkpoint

    bench = Bench(model, folder)
    modes = {"alone": bench.alone, "at once": bench.at_once, "behind": bench.behind}
    first = {mode: run()["stall_s"] for mode, run in modes.items()}
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(rounds):
        for mode, run in modes.items():
            found[mode].append(run())
    table = {}
    for mode, some in found.items():
        table[mode] = {name: statistics.median(one[name] for one in some) for name in ("stall_s", "on_disk_s")}
        table[mode]["step_s"] = statistics.median(seconds for one in some for seconds in one["steps"])
        table[mode]["first_stall_s"] = first[mode]
    latest = checkpoint.find_latest(folder)
    assert latest is not None
    return checkpoint.size_bytes(latest), table


def rows_of(model: str, size: int, table: dict[str, dict[str, float]], device: str) -> list[dict[str, Any]]:
    """As the CSV has them."""
    import torch

    where = {"commit": common.current_commit(), "date": common.today(), "device": device}
    where["versions"] = f"torch {torch.__version__}"
    return [
        {**where, "model": model, "bytes": size, "mode": mode, "rounds": ROUNDS}
        | {name: f"{value:.4g}" for name, value in values.items()}
        for mode, values in table.items()
    ]


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    first = rows[0]
    lines = [
        "# What a save costs training",
        "",
        "Made by `python benchmarks/bench_checkpoint.py --table`; the script's first lines say what is measured.",
        f"Commit {first['commit']}, {first['date']}, {first['device']}, {first['versions']}.",
        "",
        "| model | GiB | mode | training waits, s | on disk after, s | a step meanwhile, s | waits the first time, s |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        size = f"{float(row['bytes']) / 2**30:.2f}"
        numbers = " | ".join(row[name] for name in ("stall_s", "on_disk_s", "step_s", "first_stall_s"))
        lines.append(f"| {row['model']} | {size} | {row['mode']} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name from kdtrain.models.architectures")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where checkpoints are written; default: the temporary"
    )
    parser.add_argument("--table", action="store_true", help="only make the table from the CSV")
    arguments = parser.parse_args()
    import torch

    on_gpu = torch.cuda.is_available()
    kind = "gpu" if on_gpu else "cpu"
    csv = RESULTS / f"{kind}_checkpoint.csv"
    if not arguments.table:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            size, table = measure(arguments.model, Path(folder))
        device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} x {common.cpu_name()}"
        common.write_csv(csv, rows_of(arguments.model, size, table, device), COLUMNS)
    text = table_of(common.read_csv(csv, "python benchmarks/bench_checkpoint.py"))
    common.write_whole(TABLES / f"checkpoint_{kind}.md", text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
