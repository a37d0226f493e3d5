"""Compile every row kernel with several releases of triton, to find those that setup.py may allow. Needs no GPU.

    python proofs/triton_releases.py                 # RELEASES, 15 minutes -> docs/results/triton_releases.md
    python proofs/triton_releases.py --only 3.10.0   # what is wrong with one release, printed

Each release is installed by pip into a folder of its own, without its dependencies, and runs `triton_sass.py --json`
and `triton_sass_lists.py --json`. Exit code 1 if setup.py allows a release with a fault, or without its machine code
here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs/results/triton_releases.md"
RELEASES = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
SCRIPTS = ("triton_sass.py", "triton_sass_lists.py")


def allowed() -> SpecifierSet:
    """The releases that setup.py allows."""
    found = re.search(r"\"(triton[^;\"]+);", (ROOT / "setup.py").read_text())
    if found is None:
        raise ValueError("setup.py names no release of triton")
    return Requirement(found[1].strip()).specifier


def measure(release: str, folder: Path) -> dict[str, Any]:
    """{rows: of both scripts, faults: their messages, warns: lines of warnings}. folder: where it is installed."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*install, f"triton=={release}"], check=True)
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels")))
    env = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    env |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder / "cache")}
    version = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(version, env=env, capture_output=True, text=True, check=True).stdout.strip()
    if found != release:
        raise ValueError(f"triton {found} was imported in place of {release}")
    rows, faults, warns = [], [], 0
    for script in SCRIPTS:
        command = [sys.executable, str(ROOT / "benchmarks" / script), "--json"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1) or "Traceback" in done.stderr:
            raise RuntimeError(f"{script} with triton {release} ended with {done.returncode}: {done.stderr[-2000:]}")
        rows += [json.loads(line) for line in done.stdout.splitlines()]
        lines = done.stderr.splitlines()
        warns += sum("Warning" in line for line in lines)
        faults += [line for line in lines if re.search(r" on (?:sm_|gfx)\d+: ", line)]
    return {"rows": rows, "faults": faults, "warns": warns}


def cell(rows: list[dict[str, Any]]) -> str:
    """Most registers on NVIDIA's and AMD's targets, and spills if there are any."""
    most = [max(r["registers"] for r in rows if r["target"].startswith(kind)) for kind in ("sm_", "gfx")]
    spills = sum(r["spills"] for r in rows)
    return f"{most[0]}, {most[1]}" + (f", **{spills} spills**" if spills else "")


def table(measured: dict[str, dict[str, Any]]) -> str:
    """Markdown: verdicts by release, then registers by kernel and release."""
    bound = allowed()
    lines = [
        "# Machine code by release of triton",
        "",
        "Made by `python proofs/triton_releases.py` without a GPU: every variant of `triton_sass.md` on sm_90 and",
        "each kernel's heaviest on sm_80, sm_100, sm_120 and gfx942; all of `triton_sass_lists.md`. Faults:",
        "local memory, slabs read or written in narrow pieces, loads in flight at a barrier where a block is",
        f"rounded in place, or a compiler that may fuse products and sums. setup.py allows triton{bound}:",
        "no release with a fault, no series that is not here.",
        "",
        "| triton | compiled | faults | lines of warnings | setup.py |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for release, found in measured.items():
        verdict = "allowed" if bound.contains(release) else "refused"
        lines.append(f"| {release} | {len(found['rows'])} | {len(found['faults'])} | {found['warns']} | {verdict} |")
    lines += ["", *(f"- {release}: {fault}" for release, found in measured.items() for fault in found["faults"])]
    lines += [
        "",
        "Most registers per thread over a kernel's variants: NVIDIA's targets, gfx942.",
        "",
        "| kernel | " + " | ".join(measured) + " |",
        "| --- |" + " ---: |" * len(measured),
    ]
    first = next(iter(measured.values()))["rows"]
    for kernel in dict.fromkeys(row["kernel"] for row in first):
        cells = [cell([r for r in found["rows"] if r["kernel"] == kernel]) for found in measured.values()]
        lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="RELEASE", help="one release; write no table")
    arguments = parser.parse_args()
    measured = {}
    for release in [arguments.only] if arguments.only else RELEASES:
        with tempfile.TemporaryDirectory() as folder:
            measured[release] = measure(release, Path(folder))
        found = measured[release]
        print(f"triton {release}: {len(found['rows'])} compiled, {len(found['faults'])} with a fault", flush=True)
        print("\n".join(found["faults"]), flush=True)
    if not arguments.only:
        TABLE.write_text(table(measured))
    return 1 if any(found["faults"] for release, found in measured.items() if allowed().contains(release)) else 0


if __name__ == "__main__":
    sys.exit(main())
