"""Peak rates of this device and the share that the row kernels reach: the denominators of all other figures.

    python benchmarks/gpu_ceilings.py [--out FOLDER] [--cpu]

matmul: 8192^3 products of bfloat16, results in bfloat16 and (out_dtype) float32; the head's three products at real
shapes. copy: bytes read plus bytes written per second of a large copy. rows: each row kernel of each backend on
[C, n] float32 slabs, in bytes per second of the logits and gradients it must read and write, as a share of the copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import measuring as common
import torch
from gpu_common import Setting
from gpu_correct import slabs
from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.dispatch import row_kernels
from kdtrain_kernels.divergences import divergence_spec
from kdtrain_kernels.matmul import logits_into
from kdtrain_kernels.torch_rows import LogitMap, RowWeights

ROW_SIZES = (*((4096, columns) for columns in (32000, 50257, 128256, 262144)), (1024, 128256))
"""(rows, columns) of the row kernels' slabs."""


def figure(setting: Setting, what: str, case: str, run: Callable[[], object], work: float, unit: str) -> dict:
    """A timed row; work: FLOP or bytes of one call."""
    seconds = setting.seconds(run)
    times = common.percentiles(seconds)
    rate = work / (float(times["median_ms"]) / 1000) / 1e12
    print(what, case, f"{rate:.4g} {unit}", flush=True)
    return {"what": what, "case": case, **times, "rate": f"{rate:.4g}", "unit": unit}


def products(setting: Setting) -> Iterator[dict]:
    """The matmul ceiling and the head's logits product."""
    side = setting.width(8192)
    a, b = (torch.randn(side, side, device=setting.device).to(setting.dtype) for _ in range(2))
    yield figure(setting, "matmul", f"{side}^3 {setting.dtype}", lambda: a @ b, 2 * side**3, "TFLOP/s")
    out = torch.empty(side, side, device=setting.device)
    yield figure(setting, "matmul", f"{side}^3 to float32", lambda: logits_into(out, a, b), 2 * side**3, "TFLOP/s")
    for width, vocab in itertools.product((2048, 4096, 8192), (32000, 128256)):
        tokens, width = setting.rows(4096), setting.width(width)
        hidden = torch.randn(tokens, width, device=setting.device).to(setting.dtype)
        head = torch.randn(vocab, width, device=setting.device).to(setting.dtype)
        logits = torch.empty(tokens, vocab, device=setting.device)
        case = f"C={tokens} D={width} V={vocab} to float32"
        work = 2 * tokens * width * vocab
        yield figure(setting, "logits", case, lambda x=(logits, hidden, head): logits_into(*x), work, "TFLOP/s")


def copy(setting: Setting) -> dict:
    """Bandwidth of a large copy."""
    size = 1 << (16 if setting.is_cpu else 30)
    source = torch.randn(size, device=setting.device)
    target = torch.empty_like(source)
    return figure(setting, "copy", f"{4 * size} bytes", lambda: target.copy_(source), 8.0 * size, "TB/s")


def rows(setting: Setting) -> Iterator[dict]:
    """Every row kernel of a loss with one round (forward_kl) and of one with two (jsd)."""
    for count, columns in ROW_SIZES:
        size = setting.rows(count), columns
        for backend in setting.backends():
            for name in ("forward_kl", "reverse_kl", "jsd"):
                for kernel, run, touched in calls(setting, backend, size, name):
                    case = f"{kernel} {name} {backend} C={size[0]} n={size[1]}"
                    yield figure(setting, "rows", case, run, float(touched) * size[0] * size[1], "TB/s")


def calls(
    setting: Setting, backend: str, size: tuple[int, int], name: str
) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(kernel, call, bytes per element that it must move).

    Gradients overwrite the slabs, which does not change their time.
    """
    kernels, spec = row_kernels(backend, setting.device), divergence_spec(name)
    student, teacher, labels = slabs(setting, *size, torch.float32)
    ones = torch.ones(size[0], dtype=torch.float64, device=setting.device)
    weights = RowWeights(kd=ones, ce=ones, labels=labels, softmax=ones)
    scratch = Scratch.of(student)
    pair = {"spec": spec, "scratch": scratch}
    grad = {"logit_map": LogitMap(), "scratch": scratch, "operand_dtype": setting.dtype}
    stored = setting.dtype.itemsize
    stats = kernels.pair_stats(student, teacher, labels, **pair)
    totals = kernels.merge_pair_stats(stats[None], spec, size[1])
    totals = replace(totals, z=torch.full_like(ones, -1.0))
    yield "pair_stats", lambda: kernels.pair_stats(student, teacher, labels, **pair), 8
    if spec.row.two_rounds:
        yield "pair_round2", lambda: kernels.pair_round2(student, teacher, totals, **pair), 8
    else:
        yield "pair_value", lambda: kernels.pair_value(student, teacher, totals, **pair), 8
    spec_grad = {"spec": spec, **grad}
    yield "pair_grad", lambda: kernels.pair_grad(student, teacher, totals, weights, **spec_grad), 8 + stored
    if name == "forward_kl":
        yield "row_stats", lambda: kernels.row_stats(student, labels, 1.0, scratch), 4
        yield "row_grad", lambda: kernels.row_grad(student, totals.student, weights, **grad), 4 + stored


def main() -> None:
    setting = Setting.parse(__doc__)
    setting.write("ceilings", itertools.chain(products(setting), [copy(setting)], rows(setting)))


if __name__ == "__main__":
    main()
