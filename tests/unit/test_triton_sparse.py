"""Sparse row kernels in Triton: interpreted against `sparse_rows`, and compiled for a device that is not present.

Interpreting and compiling exclude each other in one process, and both depend on the environment at import: this file
is also the script that the tests run, `test_triton_sparse.py CHECK ...`.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import pytest
import torch
from kdtrain_kernels import sparse_rows
from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.sparse_table import SparseGradient
from kdtrain_kernels.torch_rows import LogitMap

from kdtrain.losses import sparse_kl
from tests.support.loss_cases import relative_error
from tests.support.sparse_cases import naive_sparse_answer, sparse_case, streamed_sparse_answer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROWS, SLOTS, STRIDE = 5, 7, 384


def sparse_kernels():
    from kdtrain_kernels.triton import sparse

    sparse.BLOCK, sparse.MAX_IDS = 64, 4  # several blocks of columns and of ids on small problems
    return sparse


def columns_and_labels(n):
    """Some ids per row, some rows without; labels that are ids, that are not, and that are elsewhere."""
    columns = torch.full((ROWS, SLOTS), -1)
    for row in range(1, ROWS):
        taken = torch.randperm(n)[: row + 1]
        columns[row, SLOTS - len(taken) :] = taken
    last = max(n - 1, -1)
    return columns, torch.tensor([last, -1, int(columns[2, -1]), last, min(0, last)])


def check_stats():
    triton_rows = sparse_kernels()
    for n, temperature in product((101, 300, 384, 1, 0), (1.0, 2.0)):
        memory = 3 * torch.randn(ROWS, STRIDE) + 40
        memory[1, : n // 2] = float("-inf")
        memory[:, n:] = float("nan")
        columns, labels = columns_and_labels(n)
        left, right = memory.clone()[:, :n], memory.clone()[:, :n]
        expected = sparse_rows.sparse_stats(left, columns, labels, temperature, Scratch.of(left))
        got = triton_rows.sparse_stats(right, columns, labels, temperature, Scratch.of(right))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(left, right), "other columns were masked"
        if n >= 101:
            assert left[4, columns[4][columns[4] >= 0]].isneginf().all()


def check_grad():
    triton_rows = sparse_kernels()
    settings = product(
        (101, 300, 384, 1, 0), (1.0, 2.0), (LogitMap(), LogitMap(0.7, 9.0)), (torch.float32, torch.bfloat16)
    )
    for n, temperature, logit_map, dtype in settings:
        memory = 3 * torch.randn(ROWS, STRIDE)
        memory[:, n:] = float("nan")
        columns, labels = columns_and_labels(n)
        slab = memory[:, :n]
        sparse_rows.sparse_stats(slab, columns, labels, temperature, Scratch.of(slab))
        peak = slab.double().amax(1) if n else torch.zeros(ROWS).double()
        tail, softmax, ce = torch.randn(3, ROWS, dtype=torch.float64)
        gradient = SparseGradient(
            torch.randn(ROWS, SLOTS, dtype=torch.float64), tail, softmax, ce, peak.masked_fill(peak.isneginf(), 0.0)
        )
        answers = []
        for module in (sparse_rows, triton_rows):
            own = memory.clone()
            operand = module.sparse_grad(
                own[:, :n],
                columns,
                labels,
                gradient,
                temperature,
                logit_map=logit_map,
                scratch=Scratch(4, own[:, :n]),
                operand_dtype=dtype,
            )
            assert operand.dtype == dtype
            assert operand.shape == (ROWS, n)
            assert operand.untyped_storage().data_ptr() == own.untyped_storage().data_ptr(), "not in place"
            answers.append(operand.float())
        assert answers[0].isfinite().all()
        # one rounding to 8 bits may fall on either side
        torch.testing.assert_close(*reversed(answers), rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)


def check_loss():
    """The whole loss on these kernels against float64, small head and all."""
    triton_rows = sparse_kernels()
    sparse_kl.sparse_kernels = lambda backend, device, work: triton_rows
    for scheme, name, temperature, properties in [
        ("top_k_tail", "jsd", 2.0, True),
        ("sampled", "forward_kl", 1.0, False),
        ("conditional", "reverse_kl", 2.0, True),
    ]:
        case = sparse_case(9, 101, scheme, divergence=name, temperature=temperature, properties=properties)
        got, expected = streamed_sparse_answer(case, multiple=128)[0], naive_sparse_answer(case)
        assert relative_error(got.loss, expected.loss) < 2e-6
        for which in ("grad_hidden", "grad_weight", *(["grad_bias"] if properties else [])):
            assert relative_error(getattr(got, which), getattr(expected, which)) < 1e-5, (scheme, which)


def check_refusals():
    triton_rows = sparse_kernels()
    columns, labels = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for slab, message in [
        (torch.zeros(2, 128).double(), "the slab has dtype torch.float64, need torch.float32 for backend triton"),
        (torch.zeros(2, 100), r"the slab has strides \(100, 1\), need rows a multiple of 128 elements apart"),
    ]:
        with pytest.raises(ValueError, match=message):
            triton_rows.sparse_stats(slab, columns, labels, 1.0, Scratch.of(slab))
    empty = torch.zeros(0, 128)
    assert triton_rows.sparse_stats(empty, columns[:0], labels[:0], 1.0, Scratch(1, empty)).shape == (0, 5)


POINTERS = {"slab": "*fp32", "columns": "*i64", "labels": "*i64", "at_ids": "*fp32", "factors": "*fp32"}
NUMBERS = {"stride": "i32", "n": "i32", "num_ids": "i32"}


def compiled(kernel, out, constants, target=None, backend=None):
    """The kernel, for sm_90 by default, as the launcher would specialise it for aligned pointers and strides.

    backend: how a kernel that rounds in place waits, the target's own way by default.
    """
    import triton
    from kdtrain_kernels.triton import sparse
    from kdtrain_kernels.triton.device import compile_options, rounding_on
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = target or GPUTarget("cuda", 90, 32)
    if "WIDENING" in constants:
        backend = target.backend if backend is None else backend
        constants = {**constants, **rounding_on(backend, constants["WIDENING"] > 1, constants["BLOCK"], sparse.WARPS)}
    types = {**POINTERS, **NUMBERS, "out": out}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name == "stride" or signature[name].startswith("*")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=target, options=compile_options(sparse.WARPS))


def sass(binary):
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run(
            [str(tool), "--dump-sass", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout


def variants():
    """Name -> (kernel, type of out, constants) of each variant that has most to hold."""
    from kdtrain_kernels.triton import sparse

    shared = {"AT_ONE": False, "BLOCK": sparse.BLOCK, "IDS": 64}
    grad = {**shared, "CAPPED": True}
    return {
        "sparse_stats, T": (sparse.sparse_stats_kernel, "*fp32", {**shared, "OUT_OFFSET": 4}),
        "sparse_grad, T, cap": (sparse.sparse_grad_kernel, "*fp32", {**grad, "WIDENING": 1}),
        "sparse_grad, T, cap, bf16": (sparse.sparse_grad_kernel, "*bf16", {**grad, "WIDENING": 2}),
    }


BARRIERS = {
    "sparse_stats, T": {"3.6": 11, "3.7": 11, "3.8": 8, "3.9": 8},
    "sparse_grad, T, cap": {"3.6": 1, "3.7": 1, "3.8": 1, "3.9": 1},
    "sparse_grad, T, cap, bf16": {"3.6": 2, "3.7": 2, "3.8": 2, "3.9": 2},
}
"""In the machine code for sm_90, by release of triton: another release needs its own line."""


def check_compile():
    """128-bit loads, no spills, and no load in flight at the barrier before a row is rounded in place."""
    import triton
    from triton_waits import in_flight_nvidia

    barriers = {}
    for name, (kernel, out, constants) in variants().items():
        text = sass(compiled(kernel, out, constants).asm["cubin"])
        assert len(re.findall(r"\bLDG\.E[.\w]*\.128", text)) >= 4
        assert not re.findall(r"\b(?:LDL|STL)", text), "registers spilled"
        assert int(re.search(r"REG:(\d+)", text)[1]) <= 96
        barriers[name] = len(re.findall(r"\bBAR\.(?:SYNC|RED)", text))
        if "bf16" in name:
            assert in_flight_nvidia(text) == 0
            plain = compiled(kernel, out, constants, backend="")
            assert in_flight_nvidia(sass(plain.asm["cubin"])) > 0, "the gate above cannot fail"
    # one fewer for each tl.debug_barrier() taken out: reductions bring barriers of their own
    series = triton.__version__.rpartition(".")[0]
    assert barriers == {name: counts[series] for name, counts in BARRIERS.items()}


def run_checks(names, tmp_path, **settings):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    folders = [str(root / folder) for folder in (".", "kernels", "proofs", "benchmarks")]
    path = os.pathsep.join([*folders, env.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, __file__, *names],
        env={**env, **settings, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.stdout.split() == names, result.stderr


def test_interpreted_kernels_match_torch_rows_and_their_loss_matches_float64(tmp_path):
    run_checks(["stats", "grad", "loss", "refusals"], tmp_path, TRITON_INTERPRET="1")


def test_kernels_compile_for_sm_90_with_wide_loads_and_without_spills(tmp_path):
    run_checks(["compile"], tmp_path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{name}"]()
        print(name)
