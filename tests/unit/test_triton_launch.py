"""Every kernel is launched by one function, which sets every compiler option explicitly."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

FOLDER = Path(__file__).resolve().parents[2] / "kernels/kdtrain_kernels/triton"
OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}


class Kernel:
    """In place of a compiled kernel: the grids and arguments of its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **named: self.launches.append((grid, arguments, named))


def test_launch_sets_every_compiler_option():
    from kdtrain_kernels.triton.device import launch

    kernel, slab = Kernel(), torch.zeros(3, 128)
    launch(kernel, slab, 3, slab, 5, warps=8, BLOCK=64)
    assert kernel.launches == [((3,), (slab, 5), {"BLOCK": 64, **OPTIONS})]
    launch(kernel, slab, 0, slab, 5, warps=8, BLOCK=64)
    assert len(kernel.launches) == 1


def launches(source):
    """Lines where something subscripted is called, kernel[grid](...), or a kernel's run or warmup is."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Subscript)
        or (isinstance(call.func, ast.Attribute) and call.func.attr in ("run", "warmup"))
    ]


def test_kernels_are_launched_in_one_place_only():
    found = {path.name: launches(path.read_text()) for path in FOLDER.glob("*.py")}
    assert len(found) >= 8
    assert {name: len(lines) for name, lines in found.items() if lines} == {"device.py": 1}
    assert launches("kernel[(3,)](x)") == [1]  # a launch is detected


@pytest.mark.parametrize(
    ("backend", "narrow", "block", "warps", "expected"),
    [
        ("cuda", True, 2048, 8, {"NARROW": True, "BACKEND": "cuda", "PER_THREAD": 8}),
        ("cuda", True, 4096, 8, {"NARROW": True, "BACKEND": "cuda", "PER_THREAD": 16}),
        ("", False, 128, 1, {"NARROW": False, "BACKEND": "", "PER_THREAD": 4}),
    ],
)
def test_threads_of_a_program_round_their_elements_at_one_barrier(backend, narrow, block, warps, expected):
    from kdtrain_kernels.triton.device import rounding_on

    assert rounding_on(backend, narrow, block, warps) == expected


def test_gradients_are_launched_with_as_many_elements_per_thread_as_the_barrier_takes():
    from kdtrain_kernels.triton import rows, sparse

    chosen = [rows.LAUNCHES["row_grad"], rows.LAUNCHES["pair_grad"], rows.Launch(sparse.BLOCK, sparse.WARPS)]
    assert {launch.block // (32 * launch.warps) for launch in chosen} <= {8, 16}
