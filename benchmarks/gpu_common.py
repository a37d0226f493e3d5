"""What the scripts of benchmarks/gpu_suite.sh share: device, clock, shapes, problems, CSV files.

Every script takes --out FOLDER; --small: tiny shapes, for compute-sanitizer; and --cpu: tiny shapes on the CPU with the
torch kernels, the same control flow, for continuous integration. Figures of tiny shapes mean nothing.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring as common
import torch
from torch import Tensor

from kdtrain.dist.vocab import VocabShard

WARM_UP, RUNS = 3, 20


@dataclass(frozen=True, slots=True)
class Shape:
    """T tokens, V vocabulary, D and E widths of student and teacher."""

    tokens: int
    vocab: int
    width_s: int
    width_t: int

    def __str__(self) -> str:
        return f"T={self.tokens} V={self.vocab} D={self.width_s} E={self.width_t}"


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how large a script runs, and where its CSV files go."""

    device: torch.device
    out: Path
    is_cpu: bool
    is_small: bool

    @classmethod
    def parse(cls, description: str | None) -> Setting:
        """From the command line. SystemExit without a GPU unless --cpu."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--out", type=Path, default=common.ROOT / "benchmarks/results")
        parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU, to test the control flow")
        parser.add_argument("--small", action="store_true", help="tiny shapes on the GPU, for compute-sanitizer")
        arguments = parser.parse_args()
        if not arguments.cpu and not torch.cuda.is_available():
            raise SystemExit("no CUDA device; --cpu runs tiny shapes on the CPU")
        return cls(
            torch.device("cpu" if arguments.cpu else "cuda"),
            arguments.out,
            arguments.cpu,
            arguments.cpu or arguments.small,
        )

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU, float32 on the CPU."""
        return torch.float32 if self.is_cpu else torch.bfloat16

    def backends(self) -> tuple[str, ...]:
        """Row kernels to run."""
        return ("torch",) if self.is_cpu else ("triton", "torch")

    def provenance(self) -> dict[str, str]:
        """The first columns of every row."""
        import importlib.metadata

        triton = "" if self.is_cpu else f" triton {importlib.metadata.version('triton')}"
        return {
            "commit": common.current_commit(),
            "date": common.today(),
            "device": common.cpu_name() if self.is_cpu else torch.cuda.get_device_name(),
            "versions": f"python {platform.python_version()} torch {torch.__version__}{triton}",
        }

    def write(self, name: str, found: Iterable[dict]) -> list[dict]:
        """Rows as they come -> OUT/gpu_NAME.csv (dry_NAME.csv of tiny shapes); all of them.

        The file is whole after every row: what a time limit cuts off is only what was not measured.
        """
        path, rows = self.out / f"{'dry' if self.is_small else 'gpu'}_{name}.csv", []
        provenance = self.provenance()
        for row in found:
            rows.append({**provenance, **row})
            common.write_csv(path, rows, list(dict.fromkeys(column for row in rows for column in row)))
        print(f"wrote {path}: {len(rows)} rows", flush=True)
        return rows

    def seconds(self, run: Callable[[], object], runs: int = RUNS) -> list[float]:
        """Times of `runs` calls after a warm-up: CUDA events on a GPU, the wall clock on the CPU."""
        runs, warm_up = (2, 1) if self.is_cpu else (runs, WARM_UP)
        for _ in range(warm_up):
            run()
        if self.is_cpu:
            return [_wall(run) for _ in range(runs)]
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
        for start, stop in events:
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1000 for start, stop in events]

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Growth of allocated memory during one call; on the CPU of resident memory."""
        if self.is_cpu:
            before = common.reset_peak()
            run()
            return common.memory("VmHWM") - before
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _wall(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def problem(setting: Setting, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden_s, head_s (leaves), hidden_t, head_t, labels: random, logits of standard deviation 1.5, never zeros."""
    rng = torch.Generator(setting.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, device=setting.device)

    head_s = normal(shape.vocab, shape.width_s) * 1.5 / shape.width_s**0.5
    head_t = normal(shape.vocab, shape.width_t) * 1.5 / shape.width_t**0.5
    hidden_s, hidden_t = normal(shape.tokens, shape.width_s), normal(shape.tokens, shape.width_t)
    labels = torch.randint(shape.vocab, (shape.tokens,), generator=rng, device=setting.device)
    student = [x.to(setting.dtype).requires_grad_() for x in (hidden_s, head_s)]
    return (*student, hidden_t.to(setting.dtype), head_t.to(setting.dtype), labels)


def whole_shard(vocab: int) -> VocabShard:
    """The one shard of a vocabulary that is not cut, without padding."""
    return VocabShard.of(vocab, multiple=1)
