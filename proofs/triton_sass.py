"""Compile every variant of the dense row kernels ahead of time and check the machine code. Needs no GPU.

    python proofs/triton_sass.py            # every variant and target, 15 minutes -> docs/results/triton_sass.md
    python proofs/triton_sass.py --json     # all on sm_90, each kernel's heaviest form on every target: JSON lines
    python proofs/triton_sass.py --quick # a representative few, as JSON lines, run by the tests

Needs triton (`pip install triton`), whose wheel contains the compilers and cuobjdump. Compiled with the types,
assumptions and options of a launch by kdtrain_kernels.triton.rows: float32 slabs, strides divisible by 128, base
pointers by 16. Fails (exit code 1), after all is compiled, if a kernel touches local memory (registers spilled), does
not read its slabs 16 bytes at a time, or rounds in place and reaches a barrier before its loads have completed
(triton_waits.py). For NVIDIA the numbers are those of `cuobjdump`, for AMD those in the assembly's metadata.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from kdtrain_kernels import divergence_spec
from kdtrain_kernels.dispatch import TRITON_DIVERGENCES
from kdtrain_kernels.triton import kernels, rows
from kdtrain_kernels.triton.device import compile_options, rounding_on
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_waits import in_flight_amd, in_flight_nvidia

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs/results/triton_sass.md"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    **dict.fromkeys(("slab", "student", "teacher"), "*fp32"),
    **dict.fromkeys(("out", "stats", "numbers"), "*fp64"),
    **dict.fromkeys(("stride", "stride_s", "stride_t", "operand_stride"), "i32"),
    **dict.fromkeys(("out_stride", "stats_stride", "n"), "i32"),
    **dict.fromkeys(("inv_temperature", "inv_vocab", "inv_cap", "logit_scale"), "fp32"),
    "labels": "*i64",
}
DIVISIBLE = ("stride", "stride_s", "stride_t", "operand_stride")
SHARES = [("jsd", {"teacher_share": 0.9}), ("skew_kl", {"skew": 0.7}), ("skew_reverse_kl", {"skew": 0.7})]
EXPONENTS = [{"ab_alpha": 0.0, "ab_beta": 0.8}, {"ab_alpha": 0.7, "ab_beta": 0.0}, {"ab_alpha": -0.3, "ab_beta": 1.2}]
PLAIN = {"AT_ONE": True, "CAPPED": False, "SCALED": False, "NARROW": True}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel with its constexpr arguments; `launch` is a key of rows.LAUNCHES."""

    name: str
    kernel: str
    launch: str
    constants: dict[str, Any]


def variants() -> list[Variant]:
    """Every variant that a launch may use, up to the numbers in a divergence's parameters."""
    found = [Variant("first_argmax", "first_argmax_kernel", "max", {})]
    for name, kernel, launch in [
        ("row_stats", "row_stats_kernel", "stats"),
        ("coupling", "coupling_kernel", "coupling"),
        ("pair_measure", "pair_measure_kernel", "measure"),
    ]:
        found += [_at(name, kernel, launch, {}, at_one) for at_one in (True, False)]
    for capped, scaled, narrow in [(c, s, w) for c in (0, 1) for s in (0, 1) for w in (0, 1)]:
        flags = {"CAPPED": bool(capped), "SCALED": bool(scaled), "NARROW": bool(narrow)}
        found.append(Variant("row_grad" + _suffix(flags), "row_grad_kernel", "row_grad", flags))
    cases = (
        [(name, {}) for name in TRITON_DIVERGENCES] + SHARES + [("alpha_beta", exponents) for exponents in EXPONENTS]
    )
    for name, parameters in cases:
        spec = divergence_spec(name, **parameters)
        given = rows.parameters(spec)
        label = " ".join([name, *(f"{key}={value:g}" for key, value in parameters.items())])
        for at_one in (True, False):
            found.append(_at(f"pair_sums {label}", "pair_sums_kernel", "sums", given, at_one))
            for flags in (PLAIN, {**PLAIN, "CAPPED": True}, {**PLAIN, "NARROW": False}):
                flags = {**flags, "AT_ONE": at_one, "VALUED": not spec.row.two_rounds}
                name = f"pair_grad {label}" + _suffix(flags)
                found.append(Variant(name, "pair_grad_kernel", "pair_grad", {**given, **flags}))
    return found


def _at(name: str, kernel: str, launch: str, constants: dict[str, Any], at_one: bool) -> Variant:
    flags = {**constants, "AT_ONE": at_one}
    return Variant(name + _suffix(flags), kernel, launch, flags)


def _suffix(flags: dict[str, Any]) -> str:
    words = {
        "T": flags.get("AT_ONE") is False,
        "cap": flags.get("CAPPED", False),
        "scale": flags.get("SCALED", False),
        "bf16": flags.get("NARROW", False),
    }
    return "".join(f", {word}" for word, flag in words.items() if flag)


HEAVY = (
    "row_stats, T",
    "coupling, T",
    "pair_measure, T",
    "row_grad, cap, bf16",
    "first_argmax",
    "pair_sums alpha_beta, T",
    "pair_grad alpha_beta, T, cap, bf16",
    "pair_grad reverse_kl, T, cap, bf16",
    "pair_grad jsd, T, bf16",
)
"""Each kernel's heaviest forms."""


def whole(variant: Variant, target: str) -> bool:
    """Whether the table has it: always."""
    return True


def quick(variant: Variant, target: str) -> bool:
    """Whether the short run has it: each kernel's heaviest form on sm_90, two kernels on every target."""
    if variant.name in ("row_stats, T", "pair_grad jsd, T, bf16"):
        return True
    return target == "sm_90" and variant.name in HEAVY


def releases(variant: Variant, target: str) -> bool:
    """Whether releases of triton are compared on it."""
    return target == "sm_90" or variant.name in HEAVY


def compile_one(variant: Variant, target: str, backend: str | None = None) -> dict[str, Any]:
    """Registers, local memory, wide loads and stores, barriers. backend: as `rounding_on`, the target's if None."""
    kernel, launch = getattr(kernels, variant.kernel), rows.LAUNCHES[variant.launch]
    constants = {**variant.constants, "BLOCK": launch.block}
    if "NARROW" in constants:
        backend = TARGETS[target].backend if backend is None else backend
        constants |= rounding_on(backend, constants["NARROW"], launch.block, launch.warps)
    types = {**TYPES, "operand": "*bf16" if variant.constants.get("NARROW") else "*fp32"}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    promises = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in DIVISIBLE or signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=promises)
    built = triton.compile(source, target=TARGETS[target], options=compile_options(launch.warps))
    numbers = nvidia(built.asm["cubin"]) if TARGETS[target].backend == "cuda" else amd(built.asm["amdgcn"])
    fusion = built.metadata.enable_fp_fusion
    return {"variant": variant.name, "kernel": variant.kernel, "target": target, "fusion": fusion, **numbers}


def nvidia(cubin: bytes) -> dict[str, int]:
    """Numbers from cuobjdump, contained in triton's wheel, for a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": used["REG"],
        "stack": used["STACK"] + used["LOCAL"],
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.E\.(?:\w+\.)*128", sass)),
        "barriers": len(re.findall(r"\bBAR\.(?:SYNC|RED)", sass)),
        "in_flight": in_flight_nvidia(sass),
    }


def amd(assembly: str) -> dict[str, int]:
    """The same from an assembly's metadata and text."""
    field = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
    return {
        "registers": field["vgpr_count"],
        "stack": field["private_segment_fixed_size"],
        "spills": field["vgpr_spill_count"],  # scalar registers spill into lanes of vector registers
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", assembly)),
        "wide_stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4", assembly)),
        "barriers": len(re.findall(r"\bs_barrier", assembly)),
        "in_flight": in_flight_amd(assembly),
    }


def spilled(row: dict[str, Any]) -> list[str]:
    """Faults of local memory: a stack that no instruction reads or writes costs nothing (NVIDIA)."""
    if row["spills"] or (row["stack"] and row["target"].startswith("gfx")):
        return [f"{row['spills']} instructions and {row['stack']} bytes of local memory"]
    return []


def fused(row: dict[str, Any]) -> list[str]:
    """Whether the compiler may fuse products and sums, which changes the rounding."""
    return ["products and sums may be fused"] if row["fusion"] is not False else []


def unguarded(row: dict[str, Any]) -> list[str]:
    """Whether stores over a row's own logits may come before its loads."""
    if not row["barriers"]:
        return ["no barrier between the loads and the stores of a block"]
    if row["in_flight"]:
        return [f"{row['in_flight']} wide loads in flight at a barrier"]
    return []


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel's machine code."""
    found = spilled(row) + fused(row)
    if not row["wide_loads"]:
        found.append("no 16-byte load")
    halves = "bf16" in row["variant"] and row["target"] == "gfx942"  # 4 columns a thread: 8 bytes
    if "_grad" in row["variant"] and not row["wide_stores"] and not halves:
        found.append("no wide store")
    if "bf16" in row["variant"]:
        found += unguarded(row)
    return [f"{row['variant']} on {row['target']}: {fault}" for fault in found]


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown: registers, wide loads and wide stores per variant and target."""
    names = list(dict.fromkeys(row["variant"] for row in measured))
    cell = {(row["variant"], row["target"]): row for row in measured}
    wrong = sum(bool(faults(row)) for row in measured)
    lines = [
        "# Machine code of the dense row kernels",
        "",
        f"Made by `python proofs/triton_sass.py` with triton {triton.__version__}, without a GPU. Registers per",
        "thread (gfx942: vector registers), and 16-byte loads + 16-byte stores in the code (gfx942 stores bf16 in 8).",
        "Blocks and warps:",
        "; ".join(f"{name} {launch.block} x {launch.warps}" for name, launch in rows.LAUNCHES.items()) + ".",
        "",
        f"{len(measured)} compiled, {wrong} with a fault: local memory, no wide loads or stores, or, where a block is",
        "rounded in place, no barrier or loads in flight at one.",
        "T: at another temperature than 1; cap: with a soft-cap; scale: with a logit scale; bf16: rounded in place.",
        "",
        "| variant | " + " | ".join(TARGETS) + " |",
        "| --- |" + " ---: |" * len(TARGETS),
    ]
    for name in names:
        found = (cell[name, target] for target in TARGETS)
        lines.append(
            f"| {name} | "
            + " | ".join(f"{r['registers']}, {r['wide_loads']} + {r['wide_stores']}" for r in found)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="what compares releases, as JSON lines; write no table")
    parser.add_argument("--quick", action="store_true", help="a few kernels, as JSON lines; write no table")
    parser.add_argument("--jobs", type=int, default=2, help="compile this many at a time")
    arguments = parser.parse_args()
    chosen = quick if arguments.quick else releases if arguments.json else whole
    jobs = [(v, t) for v in variants() for t in TARGETS if chosen(v, t)]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        measured = list(pool.map(compile_one, *zip(*jobs, strict=True)))
    wrong = [fault for row in measured for fault in faults(row)]
    if arguments.quick or arguments.json:
        print("\n".join(map(json.dumps, measured)))
    else:
        TABLE.write_text(table(measured))
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
