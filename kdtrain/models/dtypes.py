"""The dtype of each tensor of a model as transformers loads it: a few stay in float32 when the model is in bfloat16.

A class lists names that stay (`_keep_in_fp32_modules_strict`: since transformers 5.24 the routers of most mixtures,
before it their score corrections), and may create a tensor in a dtype of its own (`A_log` of OLMo-Hybrid's recurrent
layers). Rounding those changes the model: tokens are routed to other experts. The other list of a class,
`_keep_in_fp32_modules`, is for float16 only, which kdtrain does not have.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import build_glob_alternation


def listed_in_float32(model: Any) -> re.Pattern[str] | None:
    """Finds (`search`) tensors that the class of `model`, stock or cut, lists to stay in float32 beside bfloat16."""
    plan = model._get_dtype_plan(torch.bfloat16)
    return build_glob_alternation(list(plan))[0] if plan else None


def dtypes_of(built: Any) -> dict[str, torch.dtype]:
    """Name -> dtype of every parameter and buffer, tied ones under all names, as from_pretrained(dtype=...) has them.

    built: the whole stock model as created by its class in that dtype, possibly on meta.
    """
    buffers = dict(built.named_buffers(remove_duplicate=False))
    found = {name: tensor.dtype for name, tensor in built.named_parameters(remove_duplicate=False)}
    found |= {name: tensor.dtype for name, tensor in buffers.items()}
    listed = listed_in_float32(built)
    if listed is not None and built.config.dtype == torch.bfloat16:
        stored = built.state_dict().keys()  # tensors that are in no file keep their initial dtype
        found |= {name: torch.float32 for name in stored if found[name].is_floating_point and listed.search(name)}
    return found


def stock_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """`dtypes_of` the stock `model`, whole and made in float32, for a run in `dtype`. Allocates nothing."""
    if dtype == torch.float32:
        return dtypes_of(model)
    attention = model.config._attn_implementation
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(model.config), dtype=dtype, attn_implementation=attention
        )
    return dtypes_of(built)


def cast_buffers(model: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Cast buffers of `model`, possibly sharded, to the dtypes of `stock_dtypes`; buffers of kdtrain's own layers are
    kept."""
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if buffer.dtype != (target := dtypes.get(name, buffer.dtype)):
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._buffers[key] = buffer.to(target)
