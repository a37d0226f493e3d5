"""Set the attention of a stock model: measure the choice on a tiny copy, set it, check that transformers applied it."""

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
    """The implementation to build a model of class `kind` with, sdpa or eager, whichever implementation it will run
    with.

    Some classes choose their code when they are built, and must not look for a flash-attention package at that point.
    device: None if not known yet, treated as CUDA. Raises ConfigError where `wanted` could not work with any
    architecture.
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
    """Resolve `wanted` and set it in `model`, a stock, unsharded model built with `first_attention`. Returns its config
    name.

    device: None if not known yet: the choice is made as on CUDA, and if it is flash-attention the model keeps its
    current attention. packed: whether several documents share a sequence and must not attend to each other. Builds and
    runs a tiny random copy on the CPU. Does not communicate. Raises ConfigError when the choice cannot be used.
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
    """Set the implementation `name` through transformers. Raises ConfigError if transformers refuses or sets another
    one.

    transformers replaces implementations that a class does not list (by kernels from a hub), and only warns if a class
    does not support the setting.
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
    """The check of a run's batch size for `model`, unsharded, on this rank of `mesh`: returns a reason or None.

    seq_len: tokens of a whole sequence; None if unknown, then nothing is ruled out. sequences: per micro-batch. device:
    None if not known yet, treated as CUDA, where the limits apply.
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
