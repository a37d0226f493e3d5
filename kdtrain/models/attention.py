"""Choose an attention implementation that is installed, runs on this device and fits the architecture; give the reason.

Which ones fit an architecture is measured (`kdtrain.models.attention_probe`). Never downloads anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kdtrain.errors import ConfigError
from kdtrain.models.attention_packages import FLASH_PACKAGES, capability_obstacle, flash_obstacle

PACKED = "packed"
"""kdtrain's own implementation: torch's attention per document, without a mask (`kdtrain.models.packed`)."""

FLASH = tuple(FLASH_PACKAGES)

IMPLEMENTATIONS = ("eager", "sdpa", PACKED, *FLASH)

ONE_MASK = "sdpa_one_mask"
"""Name set in a model's config where sdpa is chosen: sdpa with one mask for all layers (`kdtrain.models.one_mask`)."""


Obstacle = Callable[[str], str | None]
"""Maps an implementation to the reason why it cannot be used, or None if it can."""


def _nothing(implementation: str) -> None:
    return None


def resolve_attention(
    wanted: str,
    *,
    device_type: str,
    dtype: str,
    capability: tuple[int, int] | None = None,
    packed: bool = True,
    measured: Obstacle = _nothing,
    size: Obstacle = _nothing,
) -> tuple[str, str]:
    """(implementation, reason) for `wanted`, which is "auto" or an implementation's name.

    device_type: "cuda" or "cpu"; dtype: "float32" or "bfloat16"; capability: compute capability of a CUDA device, None
    if unknown or AMD. packed: whether several documents share a sequence and must not attend to each other. measured:
    the obstacle in the architecture, called only if there is no other obstacle. size: the obstacle in the size of the
    run's batches. auto takes the first implementation without an obstacle, in the order flash_attention_2, packed,
    sdpa, eager; if documents are not packed, sdpa needs no mask and precedes packed. Raises ConfigError when an
    explicit choice cannot work here.
    """

    def obstacle(implementation: str) -> str | None:
        here = _obstacle_here(implementation, device_type, dtype, capability)
        return here or size(implementation) or measured(implementation)

    def last_resort(implementation: str) -> str | None:
        return size("sdpa") or obstacle(implementation)  # eager needs more memory than sdpa

    if wanted == "auto":
        middle = (PACKED, "sdpa") if packed else ("sdpa", PACKED)
        looked_at = dict.fromkeys(("flash_attention_2", *middle), obstacle)
        return _first_without({**looked_at, "eager": last_resort})
    if wanted not in IMPLEMENTATIONS:
        raise ConfigError(f"attention = {wanted!r} is not known\n  fix: use auto, {', '.join(IMPLEMENTATIONS)}")
    if (found := obstacle(wanted)) is not None:
        raise ConfigError(
            f"attention = {wanted!r} cannot be used: {found}\n"
            "  why: an explicit choice never falls back to another implementation\n"
            "  fix: set attention=auto, which takes the best that works, or install what is missing"
        )
    return wanted, "explicit setting"


def _first_without(obstacles: dict[str, Obstacle]) -> tuple[str, str]:
    passed_over: list[str] = []
    for implementation, obstacle in obstacles.items():
        if (found := obstacle(implementation)) is None:
            reason = "; ".join(passed_over) or "flash-attn can be imported and the device is CUDA"
            return implementation, f"auto: {reason}"
        passed_over.append(found if found.startswith(implementation) else f"{implementation}: {found}")
    raise ConfigError(
        "attention = 'auto' finds no implementation that can be used\n"
        + "".join(f"    {line}\n" for line in passed_over)
        + "  why: each would fail, or let documents see each other\n"
        "  fix: lower data.seq_len or data.sequences_per_micro_batch, or use another architecture"
    )


def compute_capability(device: torch.device | None) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA device; None for any other device or if it is unknown."""
    if device is None or device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def _obstacle_here(implementation: str, device_type: str, dtype: str, capability: tuple[int, int] | None) -> str | None:
    if implementation not in FLASH:
        return None
    if device_type != "cuda":
        return f"{implementation} needs a CUDA device, this is {device_type}"
    if dtype == "float32":
        return f"{implementation} needs bfloat16, this is float32"
    problem = capability_obstacle(implementation, capability) or flash_obstacle(implementation)
    return None if problem is None else f"{implementation}: {problem}"


def common_name(name: str) -> str:
    """The documented name of an implementation, given its name in a model's config."""
    return "sdpa" if name == ONE_MASK else name
