"""Set the attention of a stock model: measure the choice on a tiny copy, set it, check what transformers has set."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError
from kdtrain.log import LOGGER
from kdtrain.models.attention import (
    FLASH,
    ONE_MASK,
    Obstacle,
    common_name,
    compute_capability,
    resolve_attention,
)
from kdtrain.models.attention_limits import size_obstacle
from kdtrain.models.attention_probe import attention_obstacle, head_width
from kdtrain.models.shrink import declared_heads
from kdtrain.models.stock import BUILD_ERRORS


def first_attention(wanted: str, kind: Any, *, dtype: str, device: torch.device | None) -> str:
    """With masks, sdpa or eager: what a model of the class `kind` is built with, whatever it will use.

    Some classes choose their code when they are built, and none may look for a flash-attention package then. device:
    None: not known yet, then as on CUDA. Raises ConfigError where `wanted` could not work with any architecture.
    """
    resolve_attention(wanted, device_type=_device_type(device), dtype=dtype, capability=compute_capability(device))
    return "sdpa" if wanted != "eager" and getattr(kind, "_supports_sdpa", False) else "eager"


def use_attention(
    model: Any,
    source: str,
    wanted: str,
    *,
    dtype: str,
    device: torch.device | None,
    packed: bool,
    cp_size: int,
    size: Obstacle,
) -> str:
    """Set in `model`, stock and whole, built with `first_attention`, the implementation that `wanted` comes to; its
    name in a model's config.

    device: None: not known yet; then the choice is that on CUDA, and where it is flash-attention the model keeps the
    attention it has. packed: whether documents share sequences and must not see each other. Builds and runs a
    tiny random copy on the CPU. Does not communicate. Raises ConfigError when a choice cannot hold.
    """
    measured = partial(attention_obstacle, model, source, packed=packed)
    implementation, reason = resolve_attention(
        wanted,
        device_type=_device_type(device),
        dtype=dtype,
        capability=compute_capability(device),
        packed=packed,
        measured=measured,
        size=size,
    )
    if device is None and implementation in FLASH:
        return implementation
    if device is not None:
        LOGGER.info("attention of %s: %s (%s)", source, implementation, reason)
    one = implementation == "sdpa" and packed and cp_size == 1 and measured(ONE_MASK) is None
    name = ONE_MASK if one else implementation
    set_attention(model, name, source)
    return name


def set_attention(model: Any, name: str, source: str) -> None:
    """Let transformers set the implementation `name`; ConfigError if it sets another one, or refuses.

    It replaces what a class does not list (by kernels from a hub), and only warns where a class cannot be set at all.
    """
    if model.config._attn_implementation == name:
        return
    try:
        model.set_attn_implementation(name)
    except BUILD_ERRORS as error:
        raise _not_set(name, source, f"transformers refuses it: {str(error) or type(error).__name__}") from error
    if (found := model.config._attn_implementation) != name:
        raise _not_set(name, source, f"transformers sets {found!r} instead")


def run_size(
    model: Any, mesh: Mesh, device: torch.device | None, *, packed: bool, seq_len: int | None, sequences: int
) -> Obstacle:
    """What the size of a run's batches rules out for `model`, whole, on this rank of `mesh`.

    seq_len: tokens of whole sequences, None: not known, then nothing; sequences: of a micro-batch. device: None: not
    known yet, then as on CUDA, where the limits are.
    """
    if seq_len is None:
        return lambda implementation: None
    heads = -(-declared_heads(model.config)[0] // mesh.tp_size)
    return partial(
        size_obstacle,
        device_type=_device_type(device),
        packed=packed,
        seq_len=seq_len,
        sequences=sequences,
        heads=-(-heads // mesh.cp_size),
        head_width=head_width(model) or 1,
    )


def _device_type(device: torch.device | None) -> str:
    return "cuda" if device is None else device.type


def _not_set(name: str, source: str, problem: str) -> ConfigError:
    return ConfigError(
        f"{source}: attention = {common_name(name)!r} cannot be set: {problem}\n"
        "  why: a run with another attention than was chosen might let documents see each other\n"
        "  fix: set attention=auto, sdpa or eager"
    )
