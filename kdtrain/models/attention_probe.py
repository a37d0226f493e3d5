"""Measure, before a weight is read, which attention implementations compute what a model's masked attention computes.

transformers builds masks from position_ids, so sdpa and eager separate packed documents wherever `kdtrain.models.probe`
has verified it. Flash-attention and packed attention take document boundaries instead: keyword arguments that must
reach every attention call, through decoder layers that may drop them. Each implementation is run on a tiny random copy
of the config to be loaded and compared with the masked path. Nothing here communicates, and nothing needs a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from kdtrain.batch import Batch
from kdtrain.errors import ConfigError, KdtrainError
from kdtrain.models.attention import FLASH, ONE_MASK, PACKED
from kdtrain.models.backbone import Backbone
from kdtrain.models.context import packed_attention
from kdtrain.models.context_probe import small_windows
from kdtrain.models.flash_stand_in import CALLS, note_call, stand_in_name
from kdtrain.models.probe import TOLERANCE, base_attention, difference, run_on_copy, whole_backbone
from kdtrain.models.shrink import VOCAB_SIZE, declared_head_dim
from kdtrain.models.stock import BUILD_ERRORS

COUNTED_PACKED = "counted_packed"
"""Packed attention, registered under a name that records its calls."""

WIDEST_FLASH_HEAD = 256
"""Width of the widest heads that flash-attention computes."""

_WIDTHS = ("head_dim", "head_size", "attention_head_size", "qk_head_dim", "v_head_dim")

_NO_SDPA = "this architecture cannot use torch's scaled_dot_product_attention"

_OWN_CODE = "this architecture chooses its attention code by itself, not through transformers' attention interface"

_KNOWN: dict[str, str | None] = {}


def attention_obstacle(model: Any, source: str, implementation: str, *, packed: bool = True) -> str | None:
    """The reason why the architecture of `model` cannot compute attention with `implementation`; None if it can.

    model: the stock model, parameters possibly on meta. implementation: one of IMPLEMENTATIONS, or ONE_MASK. packed:
    whether several documents share a sequence and must not attend to each other. Builds and runs a tiny random copy on
    the CPU, once per process and config; leaves torch's random state unchanged. The model must have passed
    `check_model`: this function measures equality with the attention checked there.
    """
    if implementation in ("eager", "sdpa"):
        return None if implementation == "eager" or model._supports_sdpa else _NO_SDPA
    settings = model.config.to_json_string(use_diff=False)
    key = f"{implementation} {packed} {type(model).__name__} {base_attention(model)} {settings}"
    if key not in _KNOWN:
        _KNOWN[key] = declared_obstacle(model, implementation) or _measured(model, source, implementation, packed)
    return _KNOWN[key]


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules of `model` whose class name contains "attention", by name."""
    found = {name: module for name, module in model.named_modules() if "Attention" in type(module).__name__}
    return {name: module for name, module in found.items() if not any(other.startswith(f"{name}.") for other in found)}


def head_width(model: Any) -> int | None:
    """Width of the widest head of any attention layer; None if neither modules nor config give it."""
    modules = attention_modules(model).values()
    widths = [value for m in modules for name in _WIDTHS if type(value := getattr(m, name, None)) is int]
    return max(widths, default=declared_head_dim(model.config))


def declared_obstacle(model: Any, implementation: str) -> str | None:
    """The reason why the class of `model` or the width of its heads excludes `implementation`, or None.

    Runs nothing.
    """
    if not type(model)._can_set_attn_implementation():
        return _OWN_CODE
    if implementation == ONE_MASK and not model._supports_sdpa:
        return _NO_SDPA
    if implementation not in FLASH:
        return None
    if not model._supports_flash_attn:
        return "this architecture cannot use flash-attention"
    listed = getattr(model, "_compatible_flash_implementations", None)
    if listed is not None and implementation not in listed:  # transformers would fetch one of these from a hub
        return f"this architecture takes no {implementation}, only {', '.join(listed)}"
    if type(model)._check_and_adjust_attn_implementation is not PreTrainedModel._check_and_adjust_attn_implementation:
        return "this architecture has rules of its own for flash-attention, which cannot be tried without a GPU"
    width = head_width(model)
    if width is None or width > WIDEST_FLASH_HEAD:
        known = "of unknown width" if width is None else f"{width} wide"
        return f"its heads are {known}, and flash-attention stops at {WIDEST_FLASH_HEAD}"
    return None


def _measured(model: Any, source: str, implementation: str, packed: bool) -> str | None:
    name = COUNTED_PACKED if implementation == PACKED else implementation
    name = stand_in_name(implementation) if implementation in FLASH else name
    work = partial(_obstacle_of_copy, name=name, packed=packed)
    try:
        return run_on_copy(model, source, work, small_windows(model.config))
    except ConfigError as error:
        return "no tiny copy with small attention windows can be run: " + str(error).splitlines()[1].strip()[:200]


def _obstacle_of_copy(copy: Any, *, name: str, packed: bool) -> str | None:
    """The reason why attention under `name` differs from the copy's own masked attention; None if it does not."""
    ids = torch.randint(4, VOCAB_SIZE, (2, 12))
    positions = torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])
    if not packed:
        positions = torch.arange(12).expand(2, -1)
    batch = Batch(ids, ids, torch.ones(ids.shape), positions, torch.arange(2))
    backbone = whole_backbone(copy)
    masked = backbone.hidden_states(batch)
    ran: list[nn.Module] = []
    for module in attention_modules(backbone).values():
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
    try:
        backbone.config._attn_implementation = name
        found = backbone.hidden_states(batch)
    except KdtrainError as error:
        return str(error).splitlines()[0]
    except BUILD_ERRORS as error:
        return f"a tiny copy cannot be run with it: {type(error).__name__}: {error}".splitlines()[0][:200]
    if name != ONE_MASK and (problem := _problem_of_calls(backbone, ran, packed)):
        return problem
    apart = difference(found, masked)
    if apart > TOLERANCE:
        return f"hidden states of a tiny copy differ by {apart:.2g} of their size from those with masks"
    return None


def _problem_of_calls(backbone: Backbone, ran: list[nn.Module], packed: bool) -> str | None:
    """The problem with the attention calls of a forward pass in which the modules `ran` were run; None if there is
    none."""
    calling = [module for module in backbone.modules() if hasattr(module, CALLS)]
    if not calling:
        return "none of its layers calls the attention that the config names"
    if not packed:
        return None
    if silent := [module for module in ran if module not in calling]:
        return f"{type(silent[0]).__name__} does not call the attention that the config names"
    if lost := [module for module in calling if not all(getattr(module, CALLS))]:
        return f"document boundaries do not reach {type(lost[0]).__name__}: the layers around it drop keyword arguments"
    return None


def _counted_packed(module: nn.Module, *tensors: Any, **settings: Any) -> tuple[Tensor, None]:
    found = packed_attention(module, *tensors, **settings)
    note_call(module, apart=True)
    return found


AttentionInterface.register(COUNTED_PACKED, _counted_packed)
