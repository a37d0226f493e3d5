"""The releases that these kernels need."""

from __future__ import annotations

import re

TORCH_FLOOR = (2, 10)
"""The first release whose addmm adds a product of bfloat16 factors to float32 (out_dtype)."""


def torch_problem(version: str) -> str:
    """The message (problem, why, fix) if torch's `version` is older than TORCH_FLOOR, else empty.

    Pre-releases of the floor count as older, as they do for pip: some were built before addmm supported it.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.\d+)*(a|b|rc|\.dev)?", version)
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    if release > TORCH_FLOOR or (release == TORCH_FLOOR and found is not None and not found[3]):
        return ""
    floor = ".".join(map(str, TORCH_FLOOR))
    return (
        f"kdtrain_kernels needs torch >= {floor}, found {version}\n"
        "  why: the head's gradient adds products of bfloat16 to float32; older releases reject that on a GPU, "
        "in the first backward\n"
        f"  fix: pip install 'torch>={floor}'"
    )
