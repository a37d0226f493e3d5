"""Choose an attention implementation that is installed and works here, and say why. Never downloads anything."""

from __future__ import annotations

from kdtrain.errors import ConfigError
from kdtrain.models.attention_packages import FLASH_PACKAGES, flash_obstacle

PACKED = "packed"
"""Our own: torch's attention document by document, without a mask (`kdtrain.models.packed`)."""

IMPLEMENTATIONS = ("eager", "sdpa", PACKED, *FLASH_PACKAGES)


def resolve_attention(
    wanted: str, *, device_type: str, dtype: str, has_sdpa: bool = True, has_flash: bool = True
) -> tuple[str, str]:
    """(implementation, reason) for `wanted`, which is "auto" or an implementation's name.

    device_type: "cuda" or "cpu"; dtype: "float32" or "bfloat16"; has_sdpa: False for an architecture that torch's
    scaled_dot_product_attention cannot do (Gemma 2 soft-caps its attention logits); has_flash: False for one that
    flash-attention cannot do (Bloom adds biases to them). auto means flash_attention_2 on CUDA in bfloat16 when its
    package can be imported and the architecture can use it, else sdpa, else eager. Raises ConfigError when an explicit
    choice cannot work here.
    """
    if wanted == "auto":
        obstacle = _obstacle("flash_attention_2", device_type, dtype, has_flash)
        if obstacle is None:
            return "flash_attention_2", "auto: flash-attn can be imported and the device is CUDA"
        if not has_sdpa:
            return "eager", f"auto: {obstacle}, and this architecture cannot use sdpa"
        return "sdpa", f"auto: {obstacle}"
    if wanted not in IMPLEMENTATIONS:
        raise ConfigError(f"attention = {wanted!r} is not known\n  fix: use auto, {', '.join(IMPLEMENTATIONS)}")
    obstacle = _obstacle(wanted, device_type, dtype, has_flash)
    if wanted == "sdpa" and not has_sdpa:
        obstacle = "this architecture cannot use torch's scaled_dot_product_attention"
    if obstacle is not None:
        raise ConfigError(
            f"attention = {wanted!r} cannot be used: {obstacle}\n"
            "  why: an explicit choice never falls back to another implementation\n"
            "  fix: set attention=auto, or install what is missing"
        )
    return wanted, "asked for"


def _obstacle(implementation: str, device_type: str, dtype: str, has_flash: bool) -> str | None:
    if implementation not in FLASH_PACKAGES:
        return None
    if not has_flash:
        return "this architecture cannot use flash-attention"
    if device_type != "cuda":
        return f"{implementation} needs a CUDA device, this is {device_type}"
    if dtype == "float32":
        return f"{implementation} needs bfloat16, this is float32"
    problem = flash_obstacle(implementation)
    return None if problem is None else f"{implementation}: {problem}"
