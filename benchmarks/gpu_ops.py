"""Whole operations: time, share of the matmul rate measured in the same run, memory; with --peers also other packages.

    python benchmarks/gpu_ops.py [--out FOLDER] [--cpu] [--peers]

Useful work is counted alike for every implementation: 2 T V E for a teacher's product and 6 T V D for the student's
three; recomputation is not counted. Slabs of 5 GiB and 1 GiB. Without --peers: linear_kd_loss (forward KL, jsd),
linear_sparse_kd_loss, linear_cross_entropy, linear_topk at the shapes of the plan, every backend. With --peers: every
provider of benchmarks/loss_providers.py at a few shapes, in turn; before one is timed its value and gradients are
compared with float64 at fewer tokens, and the error is in its row. If a provider cannot run or raises an exception, its
row has the reason, and the others continue. Exits with 1 if an operation of kdtrain raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import loss_providers as providers
import measuring as common
import torch
from gpu_common import Setting, Shape, attempt, problem, whole_shard

from kdtrain.losses import SparseTarget, linear_sparse_kd_loss
from kdtrain.teacher.topk import linear_topk

CHECKED_TOKENS = 512
OURS = ("streamed", "sparse", "linear_topk")
"""Prefix of the names of kdtrain's providers."""
SLABS = {"5GiB": 5 << 30, "1GiB": 1 << 30}


def shapes(setting: Setting) -> list[Shape]:
    """Section by section: vocabularies, widths, then more tokens."""
    pairs = ((2048, 4096), (2048, 8192), (4096, 4096))
    found = [Shape(8192, vocab, *pair) for vocab in (32000, 128256, 151936, 262144) for pair in pairs]
    return [setting.shape(shape) for shape in (*found, Shape(32768, 128256, 2048, 4096))]


def peer_shapes(setting: Setting) -> list[Shape]:
    """A large vocabulary, then a wide student."""
    return [setting.shape(shape) for shape in (Shape(8192, 128256, 2048, 4096), Shape(8192, 32000, 4096, 4096))]


def work_of(task: str, shape: Shape) -> int:
    """Useful FLOP of a call."""
    teacher, student = 2 * shape.width_t, 6 * shape.width_s
    per_logit = {"ce": student, "sparse": student, "topk": teacher}.get(task, teacher + student)
    return per_logit * shape.tokens * shape.vocab


def peak_rate(setting: Setting) -> float:
    """FLOP/s of a large matrix product, measured now."""
    side = setting.width(8192)
    a, b = (torch.randn(side, side, device=setting.device).to(setting.dtype) for _ in range(2))
    return 2 * side**3 / (float(common.percentiles(setting.seconds(lambda: a @ b))["median_ms"]) / 1000)


def timed(setting: Setting, task: str, shape: Shape, name: str, run: Callable[[], object], rate: float) -> dict:
    """A row; running out of memory is a result, and so is any other failure."""
    row = {"task": task, "shape": str(shape), "provider": name}
    measured, reason = attempt(lambda: (setting.peak_bytes(run), setting.seconds(run, runs=10)))
    if measured is None:
        return {**row, "absent": "out of memory" if reason.startswith("OutOfMemoryError") else f"FAILED: {reason}"}
    peak, times = measured[0], common.percentiles(measured[1])
    useful = work_of(task, shape) / (float(times["median_ms"]) / 1000)
    print(task, shape, name, times["median_ms"], "ms", f"{useful / rate:.3f} of matmul", flush=True)
    figures = {"useful_tflops": f"{useful / 1e12:.4g}", "share_of_matmul": f"{useful / rate:.3f}"}
    return {**row, **times, **figures, "peak_bytes": peak, "absent": ""}


def step(loss: Callable, inputs: tuple) -> Callable[[], object]:
    """Loss and gradients of the student's arguments."""
    return lambda: torch.autograd.grad(loss(*inputs), inputs[:2])


def whole_operations(setting: Setting) -> Iterator[dict]:
    """kdtrain's operations, every backend and slab."""
    widths = setting.width(2048), setting.width(4096)
    for shape in shapes(setting):
        rate, inputs = peak_rate(setting), problem(setting, shape)
        shard = whole_shard(shape.vocab)
        for backend in setting.backends():
            if backend == "torch" and (shape.width_s, shape.width_t) != widths:
                continue  # slow, and the widths change only the products
            for slab, size in SLABS.items():
                for task in ("kl", "jsd", "ce"):
                    run = step(providers.streamed(task, size, backend), inputs)
                    yield timed(setting, task, shape, f"streamed-{slab}-{backend}", run, rate)
            yield timed(setting, "sparse", shape, f"sparse-64-{backend}", step(sparse(inputs, backend), inputs), rate)
            arguments = {"shard": shard, "slab_bytes": SLABS["1GiB"], "backend": backend}
            for k in (64, 256):

                def select(k: int = k, inputs: tuple = inputs, arguments: dict = arguments) -> object:
                    return linear_topk(inputs[2], inputs[3], k, **arguments)

                yield timed(setting, "topk", shape, f"linear_topk-{k}-{backend}", select, rate)
        yield timed(setting, "topk", shape, "torch-64", lambda inputs=inputs: torch_list(inputs, 64), rate)


def sparse(inputs: tuple, backend: str) -> Callable:
    """linear_sparse_kd_loss on the teacher's 64 first ids and the rest, which are not part of the time."""
    shard, ones = whole_shard(len(inputs[1])), torch.ones(len(inputs[4]), device=inputs[4].device)
    top = linear_topk(inputs[2], inputs[3], 64, shard=shard)
    target = SparseTarget(top.ids, (top.logits - top.lse).exp(), top.log_tail[:, 0], 0 * ones, 0 * ones)

    def loss(hidden_s, head_s, hidden_t, head_t, labels):
        weights = {"kd_weight": ones, "ce_weight": ones, "allow_biased": True, "backend": backend}
        return linear_sparse_kd_loss(hidden_s, head_s, target, labels, shard=shard, **weights).loss

    return loss


@torch.no_grad()
def torch_list(inputs: tuple, k: int) -> object:
    """All logits in float32, torch.topk, logsumexp: what Megatron-LM's saver computes."""
    logits = (inputs[2] @ inputs[3].T).float()
    return logits.topk(k, dim=-1), logits.logsumexp(-1)


def peers(setting: Setting) -> Iterator[dict]:
    """All providers of every task, in turn."""
    for shape in peer_shapes(setting):
        inputs = problem(setting, shape)
        small = problem(setting, Shape(min(shape.tokens, CHECKED_TOKENS), shape.vocab, shape.width_s, shape.width_t))
        for task in ("kl", "jsd", "ce"):
            rate, expected = peak_rate(setting), providers.float64_answer(task, small, chunk=64)
            for provider in providers.providers(task):
                yield compared(setting, provider, shape, (small, inputs), expected, rate)


def compared(
    setting: Setting, provider: providers.Provider, shape: Shape, inputs: tuple, expected: tuple, rate: float
) -> dict:
    """A provider's row: absent, or its error at few tokens and its time at all."""
    head = {"task": provider.task, "shape": str(shape), "provider": provider.name}
    reason = provider.absent(setting.device.type)
    if provider.is_compiled and setting.is_cpu:
        reason = "not compiled in a --cpu run"
    if reason:
        return {**head, "absent": reason}
    small, whole = inputs

    def compare() -> dict[str, float]:
        loss = provider.loss(*small)
        return providers.errors_of(provider, loss, list(torch.autograd.grad(loss, small[:2])), expected)

    errors, reason = attempt(compare)
    if errors is None:
        return {**head, "absent": f"FAILED: {reason}"}
    row = timed(setting, provider.task, shape, provider.name, step(provider.loss, whole), rate)
    return {
        **row,
        **{name: f"{error:.1e}" for name, error in errors.items()},
        "packages": provider.versions(),
        "note": provider.note,
    }


def main() -> None:
    parser = Setting.parser(__doc__)
    parser.add_argument("--peers", action="store_true", help="other packages too, at fewer shapes")
    arguments = parser.parse_args()
    setting = Setting.of(arguments)
    if arguments.peers:
        found = setting.write("peers", peers(setting))
    else:
        found = setting.write("ops", whole_operations(setting))
    failed = [row for row in found if row["absent"].startswith("FAILED") and row["provider"].startswith(OURS)]
    if failed:
        raise SystemExit(f"{len(failed)} of kdtrain's operations raised")


if __name__ == "__main__":
    main()
