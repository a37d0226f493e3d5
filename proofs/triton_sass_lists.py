"""Compile the kernels of sparse records, top-k lists and samples for every target, and check their machine code.

    python proofs/triton_sass_lists.py          # two minutes -> docs/results/triton_sass_lists.md; no GPU is needed
    python proofs/triton_sass_lists.py --json   # the same, as JSON lines on stdout; no table

Variants are those that the tests compile for sm_90. Exit code 1 if a kernel touches local memory, if one that streams
a slab does not read it 16 bytes at a time, or if one that rounds in place reaches a barrier before its loads have
completed; the numbers are those of `triton_sass.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton_sass import TARGETS, amd, fused, nvidia, spilled, unguarded

from kdtrain.testing.ranks import load_file

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs/results/triton_sass_lists.md"
STREAMS = ("sparse_", "lane maxima", "tail sums", "lane sums")
"""Beginnings of the names of kernels that read whole slabs; the others read lists of a few numbers."""


def compile_one(file: str, name: str, target: str) -> dict[str, Any]:
    """Registers, local memory, wide loads and stores, barriers of a variant."""
    module = load_file(ROOT / "tests/unit" / f"{file}.py")  # it has the kernels' argument types
    variants = module.variants() if file == "test_triton_sparse" else module.VARIANTS
    built = module.compiled(*variants[name], target=TARGETS[target])
    numbers = nvidia(built.asm["cubin"]) if TARGETS[target].backend == "cuda" else amd(built.asm["amdgcn"])
    return {"variant": name, "kernel": name, "target": target, "fusion": built.metadata.enable_fp_fusion, **numbers}


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel's machine code."""
    found = spilled(row) + fused(row) + (unguarded(row) if "bf16" in row["variant"] else [])
    if row["variant"].startswith(STREAMS) and not row["wide_loads"]:
        found.append("no 16-byte load")
    return [f"{row['variant']} on {row['target']}: {fault}" for fault in found]


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown: registers and wide loads per variant and target, and what is wrong."""
    cell = {(row["variant"], row["target"]): row for row in measured}
    wrong = [fault for row in measured for fault in faults(row)]
    lines = [
        "# Machine code of the kernels of records, lists and samples",
        "",
        f"Made by `python proofs/triton_sass_lists.py` with triton {triton.__version__}, without a GPU. Registers",
        "per thread (gfx942: vector registers) and 16-byte loads in the code.",
        "",
        f"{len(measured)} compiled, {len(wrong)} with a fault: local memory, a streamed slab read in narrow pieces, or",
        "loads in flight at a barrier where a block is rounded in place.",
        *(f"- {fault}" for fault in wrong),
        "",
        "| variant | " + " | ".join(TARGETS) + " |",
        "| --- |" + " ---: |" * len(TARGETS),
    ]
    for name in dict.fromkeys(row["variant"] for row in measured):
        found = (cell[name, target] for target in TARGETS)
        lines.append(f"| {name} | " + " | ".join(f"{r['registers']}, {r['wide_loads']}" for r in found) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="JSON lines on stdout; write no table")
    arguments = parser.parse_args()
    files = {name: load_file(ROOT / "tests/unit" / f"{name}.py") for name in ("test_triton_sparse", "test_triton_topk")}
    names = [("test_triton_sparse", name) for name in files["test_triton_sparse"].variants()]
    names += [("test_triton_topk", name) for name in files["test_triton_topk"].VARIANTS]
    jobs = [(file, name, target) for file, name in names for target in TARGETS]
    with ProcessPoolExecutor(2) as pool:
        measured = list(pool.map(compile_one, *zip(*jobs, strict=True)))
    if arguments.json:
        print("\n".join(map(json.dumps, measured)))
    else:
        TABLE.write_text(table(measured))
    wrong = [fault for row in measured for fault in faults(row)]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
