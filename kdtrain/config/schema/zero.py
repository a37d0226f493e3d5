"""Section zero: DeepSpeed ZeRO for the student."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True, slots=True)
class ZeroSection:
    """DeepSpeed ZeRO for the student."""

    stage: Literal[0, 1, 2, 3] = 1
    """0: nothing is partitioned over dp; 1: optimizer states; 2: and gradients; 3: and weights."""
    offload_optimizer: bool = False
    """With stage 1 to 3: keep master weights and AdamW's moments in host memory and run AdamW there: 12 bytes less
    on the device per parameter that ZeRO gives to this rank; but every step waits for the host. It runs on this rank's
    part of the cores, or on OMP_NUM_THREADS threads if that is set (to 1 by torchrun: then it does not count)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Expert: further keys of DeepSpeed's zero_optimization section, e.g. {reduce_bucket_size: 2e8}; only keys
    that trade memory for speed are accepted. Without that one a bucket has 5e8 elements, or as many as a rank has
    parameters; with it, as many as it names, and `--check` prints their memory."""
