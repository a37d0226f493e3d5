"""The Triton kernels of top-k and samples: interpreted against `topk_rows`, compiled ahead of time for sm_90.

Interpreting and compiling exclude each other in a process, and both are decided when triton is imported: each is done
once, in a process of its own that runs this file, and reports the result of every check.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
INF = float("inf")


def rows(n, seed=0):
    """[6, n] in a padded slab with NaN between rows: random, tied, constant, masked, signed zeros, a far peak."""
    rng = torch.Generator().manual_seed(seed)
    slab = torch.full((6, n + 9), float("nan"))[:, :n]
    slab.copy_(torch.randn(6, n, generator=rng))
    slab[1] = slab[1].round()
    slab[2] = 3.0
    slab[3, 1:] = -INF
    slab[4] = torch.where(torch.rand(n, generator=rng) < 0.5, 0.0, -0.0)
    slab[5, n // 2] = 200.0
    return slab


def check_selection():
    from kdtrain_kernels import topk_rows
    from kdtrain_kernels.blocks import Scratch
    from kdtrain_kernels.triton import topk

    topk.PIECE = 32  # several pieces of candidates on small problems
    for n, k, tile in ((300, 9, 64), (5, 9, 64), (1, 1, 64), (40, 40, 16), (700, 1, 256), (0, 3, 64)):
        twin, slab = rows(n) if n else torch.zeros(6, 0), rows(n) if n else torch.zeros(6, 0)
        expected = topk_rows.topk_select(twin, k, (2.0, 1.0), entropy=True, scratch=Scratch.of(twin))
        got = topk.topk_select(slab, k, (2.0, 1.0), entropy=True, scratch=Scratch.of(slab), tile=tile)
        assert torch.equal(got.values, expected.values), (n, k)
        assert torch.equal(got.columns, expected.columns), (n, k)
        assert torch.equal(slab, twin), (n, k)
        torch.testing.assert_close(got.stats, expected.stats, rtol=2e-6, atol=1e-9)


def check_stable_sort():
    from kdtrain_kernels.blocks import Scratch
    from kdtrain_kernels.triton import topk

    topk.PIECE = 32
    x = rows(333)
    values, order = x.sort(dim=1, descending=True, stable=True)
    got = topk.topk_select(x, 20, (1.0,), entropy=False, scratch=Scratch.of(x), tile=64)
    assert torch.equal(got.columns, order[:, :20])
    assert torch.equal(got.values, values[:, :20])
    assert not got.values[got.values == 0].signbit().any()


def check_bad_rows():
    from kdtrain_kernels.blocks import Scratch
    from kdtrain_kernels.triton import topk

    slab = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    slab[1, 99], slab[2, 0], slab[4, 50] = float("nan"), -float("nan"), INF
    got = topk.topk_select(slab, 4, (1.0,), entropy=False, scratch=Scratch.of(slab), tile=64)
    assert got.stats[:, 0].tolist() == [0.0, 1.0, 1.0, 0.0, 1.0]


def check_merge():
    from kdtrain_kernels import topk_rows
    from kdtrain_kernels.blocks import Scratch
    from kdtrain_kernels.triton import topk

    for ranks, k in ((1, 4), (3, 7)):
        parts = []
        for rank in range(ranks):
            slab = rows(50, seed=rank)
            part = topk_rows.topk_select(slab, k, (2.0, 1.0), entropy=True, scratch=Scratch.of(slab))
            parts.append((part.values, part.columns + 50 * rank, part.stats))
        stacked = [torch.stack(group) for group in zip(*parts, strict=True)]
        expected = topk_rows.topk_merge(*stacked, k, (2.0, 1.0), entropy=True)
        got = topk.topk_merge(*stacked, k, (2.0, 1.0), entropy=True)
        assert torch.equal(got.values, expected.values)
        assert torch.equal(got.ids, expected.ids)
        torch.testing.assert_close(got.numbers, expected.numbers, rtol=1e-12, atol=1e-12)


def check_samples():
    from kdtrain_kernels import topk_rows
    from kdtrain_kernels.blocks import Scratch
    from kdtrain_kernels.triton import topk

    for n in (5, 32, 100, 333):
        slab = rows(n)
        slab[0, :3] = -INF
        peak = slab.double().amax(1)
        scratch = Scratch.of(slab)
        expected = topk_rows.tail_cdf(slab, peak, 1.5, scratch=scratch)
        got = topk.tail_cdf(slab, peak, 1.5, scratch=scratch, tile=64)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-12)
        targets = (torch.arange(7) + 0.5) / 7 * expected[:, -1:]
        targets[:, -1] = expected[:, -1] * 2  # beyond the end: the last column that can be drawn
        drawn = topk.tail_sample(slab, expected, targets, peak, 1.5)
        assert torch.equal(drawn, topk_rows.tail_sample(slab, expected, targets, peak, 1.5)), n
        assert (slab.gather(1, drawn) > -INF).all()


def check_whole_operations():
    from kdtrain_kernels import topk_dispatch

    from kdtrain.distributed.vocab import VocabShard
    from kdtrain.teacher.sampling import sample_targets
    from kdtrain.teacher.topk import linear_topk
    from tests.support.topk_cases import assert_same_topk, random_teacher, slab_bytes_for, whole_logits

    twin = topk_dispatch.row_kernels
    shard = VocabShard.of(101, multiple=1)
    settings = {"top_k_samples": {"tail_samples": 2}, "top_p_k": {"top_p": 0.6}, "adaptive_threshold": {}}
    slab_bytes = slab_bytes_for(4, shard, torch.float32)

    def sampled(estimator):
        hidden, head = random_teacher(5, 101, properties=True)
        tokens = torch.arange(5)
        own = settings[estimator]
        return sample_targets(
            hidden,
            head,
            estimator=estimator,
            k=5,
            seed=1,
            sample_ids=tokens,
            positions=tokens,
            labels=tokens,
            temperature=2.0,
            shard=shard,
            slab_bytes=slab_bytes,
            **own,
        )

    expected = {name: sampled(name) for name in settings}
    topk_dispatch.row_kernels = lambda backend, device, work: None  # as on a device whose row kernels are Triton's
    try:
        for integers in (True, False):
            hidden, head = random_teacher(5, 101, integers=integers)
            got = linear_topk(hidden, head, 6, shard=shard, temperatures=(2.0, 1.0), slab_bytes=slab_bytes)
            assert_same_topk(got, whole_logits(hidden, head), 6, (2.0, 1.0), 3e-6)
        for name, target in expected.items():
            got = sampled(name)
            assert torch.equal(got.ids, target.ids), name
            for field in ("weights", "label_log_prob", "entropy"):
                torch.testing.assert_close(getattr(got, field), getattr(target, field), rtol=1e-5, atol=1e-6)
    finally:
        topk_dispatch.row_kernels = twin


def check_refusals():
    from kdtrain_kernels.blocks import Scratch
    from kdtrain_kernels.triton import topk

    slab = torch.zeros(2, 8, dtype=torch.float64)
    peak, scratch = slab[:, 0], Scratch.of(slab)
    calls = [
        lambda: topk.topk_select(slab, 2, (1.0,), entropy=False, scratch=scratch),
        lambda: topk.topk_merge(slab[None], slab[None].long(), slab[None], 2, (1.0,), entropy=False),
        lambda: topk.tail_cdf(slab, peak, 1.0, scratch=scratch),
        lambda: topk.tail_sample(slab, slab, slab, peak, 1.0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"take float32 logits, got torch\.float64; choose backend torch"):
            call()


COMMON = {"slab": "*fp32", "stride": "i32", "n": "i32", "lanes": "i32", "stats_stride": "i32", "temperature": "fp32"}
TYPES = {
    "lane_maxima_kernel": {"maxima": "*fp32", "stats": "*fp64"},
    "select_kernel": {"maxima": "*fp32", "lane_list": "*i32", "key_list": "*i64", "values": "*fp32", "columns": "*i64"}
    | {"stats": "*fp64", "k": "i32", "take": "i32", "take_lanes": "i32"},
    "tail_sums_kernel": {"stats": "*fp64", "place": "i32"},
    "sort_keys_kernel": {"keys": "*i64", "width": "i32"},
    "lane_sums_kernel": {"peaks": "*fp32", "sums": "*fp32"},
    "tail_sample_kernel": {
        "cdf": "*fp64",
        "targets": "*fp64",
        "peaks": "*fp32",
        "found": "*i64",
        "m": "i32",
        "steps": "i32",
    },
}
"""Kernel -> types of arguments that are not in COMMON."""
VARIANTS = {
    "lane maxima": ("lane_maxima_kernel", {"W": 32, "LANES": 128}),
    "select 64 of 128k": ("select_kernel", {"W": 32, "G": 4096, "L": 128, "K": 128, "PIECE": 4096}),
    "select 511 of 262k": ("select_kernel", {"W": 32, "G": 8192, "L": 512, "K": 512, "PIECE": 4096}),
    "tail sums": ("tail_sums_kernel", {"FLOOR": -1e4, "ENTROPY": True, "TILE": 4096}),
    "merge 8 lists of 256": ("sort_keys_kernel", {"P": 2048}),
    "lane sums": ("lane_sums_kernel", {"W": 32, "LANES": 128}),
    "draw 64": ("tail_sample_kernel", {"W": 32, "M": 64}),
}
"""Name -> (kernel, constants) as at real vocabularies."""


def warps_of(kernel, constants, backend):
    """As the launch of a kernel chooses them."""
    from kdtrain_kernels.triton import topk

    if kernel == "select_kernel":
        return topk.select_warps(constants["L"] * constants["W"], backend)
    return topk.merge_warps(constants["P"]) if kernel == "sort_keys_kernel" else topk.WARPS


def compiled(kernel, constants, target=None):
    """The kernel, for an H100 or H200 by default, rows a multiple of 16 elements apart."""
    import triton
    from kdtrain_kernels.triton import topk_kernels
    from kdtrain_kernels.triton.device import compile_options
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = target or GPUTarget("cuda", 90, 32)
    function = getattr(topk_kernels, kernel)
    types = {**COMMON, **TYPES[kernel]}
    signature = {a: "constexpr" if a in constants else types[a] for a in function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(function.arg_names)
        if argument == "stride" or signature[argument].startswith("*")
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=compile_options(warps_of(kernel, constants, target.backend)))


def machine_code(binary):
    """SASS, by the disassembler that comes with triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout


BARRIERS = {
    "select 64 of 128k": {"3.6": 51, "3.7": 51, "3.8": 45, "3.9": 45},
    "select 511 of 262k": {"3.6": 76, "3.7": 78, "3.8": 77, "3.9": 77},
}
"""In the machine code for sm_90, by release of triton; reductions and sorts bring most of them."""


def compile_variant(name):
    sass = machine_code(compiled(*VARIANTS[name]).asm["cubin"])
    assert "EXIT" in sass
    assert not re.findall(r"\b(?:LDL|STL)\b.*", sass), "registers spill"
    if name in BARRIERS:
        import triton

        expected = BARRIERS[name][triton.__version__.rpartition(".")[0]]
        assert len(re.findall(r"\bBAR\.SYNC", sass)) == expected, "not as many as were reasoned about"
    if name in ("lane maxima", "tail sums", "lane sums"):
        assert "LDG.E.128" in sass, "the slab is not read 16 bytes at a time"


CHECKS = {name: function for name, function in globals().items() if name.startswith("check_")}


def report(mode):
    """Run everything of a mode; {name: traceback or ''} as JSON."""
    tasks = CHECKS if mode == "interpret" else {name: lambda name=name: compile_variant(name) for name in VARIANTS}
    results = {}
    for name, task in tasks.items():
        try:
            task()
            results[name] = ""
        except (AssertionError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, pytest.fail.Exception):
            results[name] = traceback.format_exc()
    print("\n" + json.dumps(results))


def run(mode):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    if mode == "interpret":
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, __file__, mode], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted():
    return run("interpret")


@pytest.fixture(scope="module")
def ahead_of_time():
    return run("compile")


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted_kernels_match_topk_rows(interpreted, name):
    assert interpreted[name] == "", interpreted[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_kernels_compile_for_sm_90_without_spills_and_read_slabs_16_bytes_at_a_time(ahead_of_time, name):
    assert ahead_of_time[name] == "", ahead_of_time[name]


if __name__ == "__main__":
    report(sys.argv[1])
