"""Checks that need a GPU, each a row with its value and the tolerance, in five parts.

    python benchmarks/gpu_probe.py [CHECK ...] [--out FOLDER] [--cpu]

products   the head's three matrix products with a float32 result, on strided slabs and the front of their rows
streams    SideStream's answers while freed memory of both streams' pools is overwritten; and that the same check
           detects a missing `record_stream` on either side
snapshot   the bytes of a copy to pinned memory whose sources are overwritten at once
packed     documents packed together, by every attention implementation (gpu_packed.py)
inplace    gradients rounded to bfloat16 over their own logits, element by element (gpu_inplace.py)

Needs torch, triton and transformers, but not deepspeed or omegaconf. Runs all five without CHECK. Rows of other checks
in the CSV are kept. If a check raises, its row has the reason, and the next one runs. Exits with 1 unless every row is
ok, or absent because the machine lacks a requirement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gpu_inplace
import gpu_packed
import measuring as common
import torch
from gpu_common import Setting, check, guarded, not_checked
from kdtrain_kernels.blocks import front_of_rows
from kdtrain_kernels.matmul import add_weight_grad_, hidden_grad_into, logits_into
from torch import Tensor

from kdtrain.teacher.side_stream import SideStream

PRODUCTS = ((1, 64, 257), (7, 128, 50257), (1040, 2048, 50257), (1040, 4096, 128256))
"""(C tokens, D width, n rows of the head)"""
PRODUCT_BOUND = 2e-4
"""Tensor cores truncate their sums, the more so the longer; results rounded to bfloat16 would be off by 2e-3."""
ROUNDS, NUMEL = 50, 1 << 22
"""Of `streams`. 16 MiB: the allocator keeps such blocks whole, so that freed memory is what the next one gets."""
SHORT_SLEEP, LONG_SLEEP = 200_000, 2_000_000
"""Cycles: the long one outlasts everything else that a round queues."""


def error_of(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((got.double() - expected).norm() / expected.norm())


def products(setting: Setting) -> Iterator[dict]:
    """logits, d hidden and d head (twice) against float64 of the same operands; outputs are filled with NaN first."""
    for tokens, width, columns in PRODUCTS:
        rows, narrow = setting.rows(tokens), setting.width(width)
        shape, device, dtype = f"C={rows} D={narrow} n={columns}", setting.device, setting.dtype
        x = torch.randn(rows, narrow, device=device).to(dtype)
        w = (torch.randn(columns, narrow, device=device) / narrow**0.5).to(dtype)
        logits = logits_into(gpu_inplace.poisoned_slab(setting, rows, columns), x, w)
        yield check("products logits", shape, error_of(logits, x.double() @ w.double().T), PRODUCT_BOUND)
        grad = front_of_rows(gpu_inplace.poisoned_slab(setting, rows, columns), dtype)
        grad.copy_(torch.randn(rows, columns, device=device))
        hidden = hidden_grad_into(torch.full((rows, narrow), torch.nan, device=device), grad, w)
        yield check("products d hidden", shape, error_of(hidden, grad.double() @ w.double()), PRODUCT_BOUND)
        total = torch.randn(columns, narrow, device=device)
        expected, again = total.double() + grad.double().T @ x.double(), total.clone()
        found, place = add_weight_grad_(total, grad, x), total.data_ptr()
        yield check("products d head", shape, error_of(total, expected), PRODUCT_BOUND)
        yield check("products d head in place", shape, float(found.data_ptr() != place), 0.0)
        different = (add_weight_grad_(again, grad, x) != total).sum()
        yield check("products d head twice", shape, float(different), 0.0, "elements that differ in the second run")


def only_inputs(tensor: Tensor, stream: Any) -> None:
    """Records only inputs, not the results, which the current stream uses."""
    if stream != torch.cuda.current_stream(tensor.device):
        tensor.record_stream(stream)


def only_answers(tensor: Tensor, stream: Any) -> None:
    """Records only results, not the inputs of work on the side stream."""
    if stream == torch.cuda.current_stream(tensor.device):
        tensor.record_stream(stream)


def streams(setting: Setting) -> Iterator[dict]:
    """Rows: no round may be wrong, and without either record_stream some must be, otherwise the first row proves
    nothing."""
    numel = NUMEL if not setting.is_cpu else 1000
    shape = f"{ROUNDS} rounds of {4 * numel} bytes"
    yield check("streams answers", shape, wrong_rounds(setting, SideStream(setting.device), numel), 0.0)
    for what, record in (("inputs", only_answers), ("answers", only_inputs)):
        name = f"streams detects unrecorded {what}"
        if setting.is_cpu:
            yield not_checked(name, shape, "nothing overlaps on the CPU")
            continue
        wrong = wrong_rounds(setting, SideStream(setting.device, record=record), numel)
        yield check(name, shape, float(wrong == 0), 0.0, f"{wrong} rounds were wrong, as they must be")


def wrong_rounds(setting: Setting, side: SideStream, numel: int) -> int:
    """Number of rounds in which work on the side stream gave a wrong sum.

    The input is released while the work sleeps, the result while its reader sleeps; the free memory of each pool is
    then filled with nan.
    """
    wrong = 0
    for number in range(ROUNDS):
        x = torch.full((numel,), float(number), device=setting.device)
        sleep(setting, SHORT_SLEEP)
        finish = side.start(partial(slow_increment, setting, x), [x])
        del x
        poison(setting, numel)
        y = finish()
        del finish
        sleep(setting, LONG_SLEEP)
        total = y.sum(dtype=torch.float64)
        del y
        with torch.cuda.stream(side.stream):  # not by `start`, which waits for the reading stream
            poison(setting, numel)
        wrong += float(total) != (number + 1.0) * numel
    return wrong


def slow_increment(setting: Setting, x: Tensor) -> Tensor:
    sleep(setting, LONG_SLEEP)
    return x + 1.0


def poison(setting: Setting, numel: int) -> Tensor:
    return torch.full((numel,), torch.nan, device=setting.device)


def sleep(setting: Setting, cycles: int) -> None:
    """Delay the device's current stream; does nothing on the CPU, which is synchronous."""
    if not setting.is_cpu:
        torch.cuda._sleep(cycles)


def snapshot(setting: Setting) -> Iterator[dict]:
    """On a GPU more than two blocks of pinned memory; blocks on the CPU: tests/unit/test_checkpoint_background.py."""
    from kdtrain.engine import background
    from kdtrain.engine.slices import Fragment

    block = background.BLOCK_BYTES // 4
    sizes = (300, 7, 900) if setting.is_cpu else (block + 1, 7, block // 3, block)
    parts = [torch.randn(size, device=setting.device) for size in sizes]
    held = background.Snapshot(setting.device)
    for turn in ("first", "again"):  # the second time into memory that is there
        expected = torch.cat([part.cpu() for part in parts])
        held.take([Fragment(str(number), "master", 0, 0, part) for number, part in enumerate(parts)])
        for part in parts:
            part.mul_(-2.0)
        got = torch.cat([torch.frombuffer(view, dtype=torch.float32) for view in held.data()])
        yield check(f"snapshot {turn}", f"{4 * sum(sizes)} bytes", float((got != expected).sum()), 0.0)


CHECKS: dict[str, Callable[[Setting], Iterator[dict]]] = {
    "products": products,
    "streams": streams,
    "snapshot": snapshot,
    "packed": gpu_packed.packed,
    "inplace": gpu_inplace.inplace,
}


def checked(setting: Setting, names: list[str]) -> Iterator[dict]:
    """The rows of these checks; one that raises has its reason as a last row."""
    for name in names:
        yield from guarded(CHECKS[name](setting), partial(not_checked, name, "", verdict="FAIL"))


def main() -> None:
    parser = Setting.parser(__doc__)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(CHECKS))
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.checks if name not in CHECKS]:
        parser.error(f"no check {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    setting, names = Setting.of(arguments), arguments.checks or list(CHECKS)
    path = setting.out / f"{setting.prefix}_probe.csv"
    before = common.read_csv(path, "") if path.exists() else []
    kept = [row for row in before if row["name"].split()[0] not in names]
    found = setting.write("probe", checked(setting, names), kept)
    failed = [row for row in found if row["verdict"] == "FAIL"]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(found)} failed, first {failed[0]['name']} {failed[0]['note']}")


if __name__ == "__main__":
    main()
