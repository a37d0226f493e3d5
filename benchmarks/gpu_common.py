"""Shared by the scripts of benchmarks/gpu_suite.sh: device, clock, shapes, problems, CSV files.

Every script takes --out FOLDER and --cpu: the torch kernels on the CPU, for continuous integration. --cpu goes through
the same list of sizes as a GPU, reduced by one rule (`Setting.rows`, `Setting.width`): at most 5 rows, widths divided
by 256, vocabularies as they are, so that every number of columns that reaches a GPU has run on the CPU before. Figures
of reduced or tiny shapes mean nothing; their files are dry_NAME.csv and small_NAME.csv.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring as common
import torch
from torch import Tensor

from kdtrain.distributed.vocab import VocabShard

WARM_UP, RUNS = 3, 20
PAIR_SECONDS, MOST_CALLS = 2e-3, 50
"""Between two CUDA events lie as many calls as take PAIR_SECONDS, at most MOST_CALLS: an event costs microseconds."""
CYCLES_PER_SECOND, MOST_AHEAD = 2e9, 2e-2
"""Most cycles of torch.cuda._sleep, and most seconds for the host to queue the measured calls."""
CPU_ROWS, CPU_WIDTH_SHARE = 5, 256

T = TypeVar("T")


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

    @staticmethod
    def parser(description: str | None) -> argparse.ArgumentParser:
        """The arguments of every script; some add more."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--out", type=Path, default=common.ROOT / "benchmarks/results")
        parser.add_argument("--cpu", action="store_true", help="reduced shapes on the CPU, to test the control flow")
        return parser

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Setting:
        """From what `parser` parsed; `small` if the script added it. SystemExit without a GPU unless --cpu."""
        if not arguments.cpu and not torch.cuda.is_available():
            raise SystemExit("no CUDA device; --cpu runs reduced shapes on the CPU")
        device = torch.device("cpu" if arguments.cpu else "cuda")
        return cls(device, arguments.out, arguments.cpu, getattr(arguments, "small", False))

    @classmethod
    def parse(cls, description: str | None) -> Setting:
        """From the command line of a script without further arguments."""
        return cls.of(cls.parser(description).parse_args())

    def rows(self, count: int) -> int:
        """`count` on a GPU, at most CPU_ROWS of them on the CPU."""
        return min(count, CPU_ROWS) if self.is_cpu else count

    def width(self, size: int) -> int:
        """`size` on a GPU, a CPU_WIDTH_SHARE-th of it but at least 8 on the CPU."""
        return max(min(size, 8), size // CPU_WIDTH_SHARE) if self.is_cpu else size

    def shape(self, shape: Shape) -> Shape:
        """`shape` with rows and widths as this setting has them, and its own vocabulary."""
        return Shape(self.rows(shape.tokens), shape.vocab, self.width(shape.width_s), self.width(shape.width_t))

    @property
    def prefix(self) -> str:
        """Of the names of files: gpu, or small or dry where figures mean nothing."""
        return "small" if self.is_small else "dry" if self.is_cpu else "gpu"

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU, float32 on the CPU."""
        return torch.float32 if self.is_cpu else torch.bfloat16

    def backends(self) -> tuple[str, ...]:
        """Row kernels to run."""
        return ("torch",) if self.is_cpu else ("triton", "torch")

    def provenance(self) -> dict[str, str]:
        """The first columns of every row."""
        triton = "" if self.is_cpu else f" triton {triton_version()}"
        return {
            "commit": common.current_commit(),
            "date": common.today(),
            "device": common.cpu_name() if self.is_cpu else torch.cuda.get_device_name(),
            "versions": f"python {platform.python_version()} torch {torch.__version__}{triton}",
        }

    def write(self, name: str, found: Iterable[dict], kept: Sequence[dict] = ()) -> list[dict]:
        """Rows as they come -> OUT/gpu_NAME.csv (`prefix`); all of them.

        kept: rows of an earlier run that stay in front, with their own provenance. The file is rewritten atomically
        before the first row and after every row, so a time limit loses only unmeasured rows.
        """
        path, rows, provenance = self.out / f"{self.prefix}_{name}.csv", [], self.provenance()

        def save() -> None:
            every = [*kept, *rows]
            common.write_csv(path, every, list(dict.fromkeys(column for row in every for column in row)))

        save()
        for row in found:
            rows.append({**provenance, **row})
            save()
        print(f"wrote {path}: {len(rows)} rows", flush=True)
        return rows

    def seconds(self, run: Callable[[], object], runs: int = RUNS) -> list[float]:
        """Times per call of `runs` measurements after a warm-up: CUDA events on a GPU, the wall clock on the CPU.

        On a GPU a measurement is several calls of a short `run` between two events, and the device sleeps until the
        host has queued them all, so that gaps between launches (a loss has about ten) are excluded.
        """
        runs, warm_up = (1, 1) if self.is_cpu else (runs, WARM_UP)
        for _ in range(warm_up):
            run()
        if self.is_cpu:
            return [_wall(run) for _ in range(runs)]
        torch.cuda.synchronize()
        queued = _wall(run)
        calls = calls_per_pair(self._between_events(run, 1, 0.0))
        ahead = min(MOST_AHEAD, 2 * calls * queued)
        return [self._between_events(run, calls, ahead) for _ in range(runs)]

    def _between_events(self, run: Callable[[], object], calls: int, ahead: float) -> float:
        """Seconds per call of `calls` calls, queued while the device sleeps for about `ahead` seconds. Synchronises."""
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(ahead * CYCLES_PER_SECOND))
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000 / calls

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


def triton_version() -> str:
    """Version of the module, from any distribution; "absent" if it cannot be imported."""
    try:
        import triton
    except ImportError:
        return "absent"
    return str(triton.__version__)


def calls_per_pair(seconds: float) -> int:
    """How many calls of `seconds` each fill PAIR_SECONDS."""
    return max(1, min(MOST_CALLS, math.ceil(PAIR_SECONDS / max(seconds, 1e-9))))


def attempt(run: Callable[[], T]) -> tuple[T | None, str]:
    """(result of `run`, "") or (None, the reason of its failure in one line): a failure becomes a row and the rest
    continues."""
    try:
        return run(), ""
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # whatever a package or a kernel raises
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:300]


def guarded(rows: Iterator[dict], failed: Callable[[str], dict]) -> Iterator[dict]:
    """`rows`; if one raises, failed(the reason) is the last."""
    while True:
        row, reason = attempt(partial(next, rows, None))
        if row is not None:
            yield row
            continue
        if reason:
            yield failed(reason)
        return


def check(name: str, shape: str, value: float, tolerance: float, note: str = "") -> dict:
    """A row of a check that passes if value <= tolerance; nan does not."""
    verdict = "ok" if value <= tolerance else "FAIL"
    print(verdict.ljust(4), name, shape, f"{value:.3g} / {tolerance:.3g}", note, flush=True)
    row = {"name": name, "shape": shape, "verdict": verdict, "value": f"{value:.4g}", "tolerance": f"{tolerance:.4g}"}
    return {**row, "note": note}


def not_checked(name: str, shape: str, reason: str, verdict: str = "absent") -> dict:
    """A row of a check that did not run, or ended early (verdict FAIL)."""
    print(verdict.ljust(4), name, shape, reason, flush=True)
    return {"name": name, "shape": shape, "verdict": verdict, "value": "", "tolerance": "", "note": reason}


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
