"""Every operation and every row kernel against float64 of the same inputs, at real shapes.

    python benchmarks/gpu_correct.py [--out FOLDER] [--small] [--cpu]

Operations: loss and gradients of linear_kd_loss (every divergence, temperatures 1 and 2), linear_sparse_kd_loss and
linear_cross_entropy, and lists of linear_topk, by every backend, from bfloat16 inputs. Row kernels: those of
`row_kernels(backend)` on float32 slabs, against the torch kernels on the same slabs in float64. Ends with 1 if
anything is further off than its bound.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import bench_topk
import torch
from gpu_common import Setting, Shape, guarded, problem, whole_shard
from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.dispatch import TRITON_DIVERGENCES, row_kernels
from kdtrain_kernels.divergences import divergence_spec
from torch import Tensor

from kdtrain.losses import SparseTarget, linear_cross_entropy, linear_kd_loss, linear_sparse_kd_loss, reference
from kdtrain.teacher.topk import linear_topk

VALUE_BOUND, GRADIENT_BOUND = 1e-5, 5e-3
"""Of operations. Gradients are rounded to bfloat16 on their way into the products, and as results."""
ROW_BOUND, ROUNDED_BOUND = 2e-5, 5e-3
"""Of row kernels in float32, and of gradients they store in bfloat16."""
SMALL_COLUMNS = 6145
"""Of --small: three blocks of the Triton kernels and one column more, so that the last block reaches past the row."""
ROW_SIZES, SMALL_ROW_SIZES = ((64, 128256), (64, 50257), (64, 4097), (7, 1)), ((6, SMALL_COLUMNS), (7, 1))
"""(rows, columns) of the row kernels' slabs."""


def shapes(setting: Setting) -> list[Shape]:
    if setting.is_small:
        return [Shape(24, SMALL_COLUMNS, 16, 24)]
    return [setting.shape(Shape(512, vocab, 2048, 4096)) for vocab in (32000, 50257, 128256, 151936, 262144)]


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def row(op: str, case: str, backend: str, errors: dict[str, tuple[float, float]]) -> dict:
    """One line of the CSV; errors: name -> (error, bound)."""
    passed = all(error <= bound for error, bound in errors.values())
    text = " ".join(f"{name}={error:.1e}/{bound:.0e}" for name, (error, bound) in errors.items())
    print("ok  " if passed else "FAIL", op, case, backend, text, flush=True)
    return {"op": op, "case": case, "backend": backend, "verdict": "ok" if passed else "FAIL", "errors": text}


def float64_loss(inputs: tuple, divergence: str | None, temperature: float, chunk: int = 64) -> tuple[Tensor, ...]:
    """(loss, d hidden_s, d head_s) of KD plus CE, or of CE alone, in float64 on the same device."""
    hidden_s, head_s, hidden_t, head_t, labels = (x.detach() for x in inputs)
    head, teacher_head = head_s.double().requires_grad_(), head_t.double()
    total, parts, grad_head = 0.0, [], torch.zeros_like(head, requires_grad=False)
    for first in range(0, len(labels), chunk):
        rows = slice(first, first + chunk)
        hidden = hidden_s[rows].double().requires_grad_()
        student, teacher = hidden @ head.T, hidden_t[rows].double() @ teacher_head.T
        loss = reference.cross_entropy(student, labels[rows]).sum()
        if divergence is not None:
            kd = reference.DIVERGENCES[divergence](student, teacher, temperature=temperature)
            loss = loss + temperature**2 * kd.sum()
        grad_hidden, grad = torch.autograd.grad(loss, (hidden, head))
        parts.append(grad_hidden)
        grad_head += grad
        total += loss.detach()
    return total, torch.cat(parts), grad_head


def losses(setting: Setting, shape: Shape) -> Iterator[dict]:
    """linear_kd_loss and linear_cross_entropy, every backend."""
    inputs = problem(setting, shape)
    hidden_s, head_s, hidden_t, head_t, labels = inputs
    ones = torch.ones(shape.tokens, device=setting.device)
    common = {"shard": whole_shard(shape.vocab), "slab_bytes": 8 * 4 * shape.vocab * (16 if setting.is_small else 512)}
    cases = [(None, 1.0), *((name, temperature) for name in TRITON_DIVERGENCES for temperature in (1.0, 2.0))]
    for divergence, temperature in cases:
        expected = float64_loss(inputs, divergence, temperature)
        for backend in setting.backends():
            if divergence is None:
                loss = linear_cross_entropy(hidden_s, head_s, labels, weight=ones, backend=backend, **common).loss
            else:
                settings = {"divergence": divergence, "temperature": temperature, "backend": backend}
                weights = {"kd_weight": ones, "ce_weight": ones}
                loss = linear_kd_loss(hidden_s, head_s, hidden_t, head_t, labels, **settings, **weights, **common).loss
            grads = torch.autograd.grad(loss, (hidden_s, head_s))
            errors = loss_errors(loss, grads, expected)
            op = "linear_kd_loss" if divergence else "linear_cross_entropy"
            yield row(op, f"{shape} {divergence or ''} tau={temperature:g}", backend, errors)


def sparse_losses(setting: Setting, shape: Shape) -> Iterator[dict]:
    """linear_sparse_kd_loss on the teacher's 64 first ids with the rest as one bucket, every backend."""
    hidden_s, head_s, hidden_t, head_t, labels = problem(setting, shape)
    shard, ones = whole_shard(shape.vocab), torch.ones(shape.tokens, device=setting.device)
    top = linear_topk(hidden_t, head_t, 64, shard=shard, temperatures=(2.0,), backend="torch")
    weights, unused = (top.logits / 2.0 - top.lse).exp(), torch.zeros_like(ones)
    target = SparseTarget(top.ids, weights, top.log_tail[:, 0], unused, unused)
    log_p = torch.cat([weights.double().log(), target.log_tail.double()[:, None]], 1)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        leaves = [x.detach().double().requires_grad_() for x in (hidden_s, head_s)]
        logits = leaves[0] @ leaves[1].T
        log_q, ids = (logits / 2.0).log_softmax(-1), top.ids.long()
        rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        pair = torch.cat([log_q.gather(-1, ids), rest], -1), log_p
        loss = (4.0 * reference.DIVERGENCES[divergence](*pair) + reference.cross_entropy(logits, labels)).sum()
        expected = loss.detach(), *torch.autograd.grad(loss, leaves)
        for backend in setting.backends():
            arguments = {"divergence": divergence, "temperature": 2.0, "kd_weight": ones, "ce_weight": ones}
            found = linear_sparse_kd_loss(
                hidden_s, head_s, target, labels, **arguments, shard=shard, allow_biased=True, backend=backend
            ).loss
            errors = loss_errors(found, torch.autograd.grad(found, (hidden_s, head_s)), expected)
            yield row("linear_sparse_kd_loss", f"{shape} {divergence} K=64 tau=2", backend, errors)


def loss_errors(loss: Tensor, grads: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict:
    """Name -> (error, bound) of a loss and its two gradients."""
    return {
        "value": (relative(loss.detach(), expected[0]), VALUE_BOUND),
        "d_hidden": (relative(grads[0], expected[1]), GRADIENT_BOUND),
        "d_head": (relative(grads[1], expected[2]), GRADIENT_BOUND),
    }


def lists(setting: Setting, shape: Shape) -> Iterator[dict]:
    """linear_topk, every backend."""
    _, _, hidden, head, _ = problem(setting, shape)
    for k in (8, 64, 256):
        for backend in setting.backends():
            top = linear_topk(hidden, head, k, shard=whole_shard(shape.vocab), backend=backend)
            answer = top.ids, top.logits, top.lse[:, 0], top.log_tail[:, 0]
            found = bench_topk.errors_of(hidden, head, k, answer, chunk=64)
            errors = {"error": (found["error"], 1e-4), "tail": (found["tail_error"], 1e-4)}
            yield row("linear_topk", f"{shape} k={k}", backend, errors)


def slabs(setting: Setting, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's logits [C, n], rows apart by a multiple of 128, and labels; a masked column in row 1.

    A row of one column keeps it: with nothing above -inf no gradient is defined.
    """
    rng = torch.Generator(setting.device).manual_seed(1)
    stride = -(-columns // 128) * 128
    memory = 3 * torch.randn(2, rows, stride, generator=rng, device=setting.device)
    if columns > 1:
        memory[:, 1, 0] = -torch.inf
    labels = torch.randint(columns, (rows,), generator=rng, device=setting.device)
    labels[::5] = -1
    student, teacher = memory.to(dtype)[:, :, :columns]
    return student, teacher, labels


def row_answers(
    setting: Setting, backend: str, size: tuple[int, int], name: str, temperature: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Results of each row kernel of a backend on the same slabs, in the order in which a loss calls them."""
    from kdtrain_kernels.torch_rows import LogitMap, RowWeights

    kernels, spec = row_kernels(backend, setting.device), divergence_spec(name, temperature=temperature)
    student, teacher, labels = slabs(setting, *size, dtype)
    ones = torch.ones(size[0], dtype=torch.float64, device=setting.device)
    weights = RowWeights(kd=ones, ce=0.5 * ones, labels=labels, softmax=0.5 * ones)
    operand_dtype = torch.float64 if dtype == torch.float64 else setting.dtype
    common = {"spec": spec, "scratch": Scratch.of(student)}
    answers = {"pair_stats": kernels.pair_stats(student, teacher, labels, **common)}
    answers["row_stats"] = kernels.row_stats(student, labels, temperature, common["scratch"])
    answers["first_argmax"] = kernels.first_argmax(student, common["scratch"])
    totals = kernels.merge_pair_stats(answers["pair_stats"][None], spec, size[1])
    answers["pair_measure"] = kernels.pair_measure(student, teacher, totals, temperature, scratch=common["scratch"])
    gradient = {"logit_map": LogitMap(), "scratch": common["scratch"], "operand_dtype": operand_dtype}
    answers["row_grad"] = kernels.row_grad(student.clone(), totals.student, weights, **gradient).clone()
    if spec.row.two_rounds:
        answers["pair_round2"] = kernels.pair_round2(student, teacher, totals, **common)
        totals = replace(totals, z=answers["pair_round2"][:, 0])
    else:
        answers["pair_value"] = kernels.pair_value(student, teacher, totals, **common)
    value, operand = kernels.pair_grad(student, teacher, totals, weights, spec=spec, **gradient)
    return {**answers, "pair_grad_value": value, "pair_grad": operand.clone()}


def rows(setting: Setting) -> Iterator[dict]:
    """Every row kernel of every backend."""
    for count, columns in SMALL_ROW_SIZES if setting.is_small else ROW_SIZES:
        size = setting.rows(count), columns
        for name in TRITON_DIVERGENCES:
            for temperature in (1.0, 2.0):
                expected = row_answers(setting, "torch", size, name, temperature, torch.float64)
                for backend in setting.backends():
                    got = row_answers(setting, backend, size, name, temperature, torch.float32)
                    errors = {
                        kernel: row_error(kernel, got[kernel], expected[kernel], not setting.is_cpu)
                        for kernel in expected
                    }
                    yield row("row kernels", f"C={size[0]} n={size[1]} {name} tau={temperature:g}", backend, errors)


def row_error(kernel: str, got: Tensor, expected: Tensor, is_rounded: bool) -> tuple[float, float]:
    """(error, bound): columns of numbers each against its own largest, gradients by their norm."""
    got, expected = got.double(), expected.double()
    if kernel in ("row_grad", "pair_grad"):
        bound = ROUNDED_BOUND if is_rounded else ROW_BOUND
        return float((got - expected).norm() / expected.norm().clamp(min=1e-6)), bound
    scale = expected.abs().amax(0).clamp(min=1e-2)
    return float(((got - expected).abs() / scale).max()), ROW_BOUND


def checked(setting: Setting) -> Iterator[dict]:
    """Row kernels, then every operation at every shape; an exception becomes a row with its reason, and the next one
    runs."""

    def failed(case: str, reason: str) -> dict:
        print("FAIL", case, reason, flush=True)
        return {"op": "raised", "case": case, "backend": "", "verdict": "FAIL", "errors": reason}

    yield from guarded(rows(setting), partial(failed, "row kernels"))
    for shape in shapes(setting):
        for operation in (losses, sparse_losses, lists):
            yield from guarded(operation(setting, shape), partial(failed, f"{operation.__name__} {shape}"))


def main() -> None:
    parser = Setting.parser(__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes, for compute-sanitizer")
    setting = Setting.of(parser.parse_args())
    found = setting.write("correct", checked(setting))
    failed = [line for line in found if line["verdict"] != "ok"]
    sys.exit(f"{len(failed)} of {len(found)} further off than their bound" if failed else 0)


if __name__ == "__main__":
    main()
