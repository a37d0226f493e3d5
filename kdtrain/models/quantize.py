"""Eight-bit weights for a frozen model, by torchao; the only module that imports it.

One scale per output row of a matrix, symmetric, weights only: a product is computed in the activations' dtype. The
quantised weights are the same in every layout: if outputs are sharded, each rank has whole rows; if inputs are sharded,
the largest entry of a row is reduced over all ranks.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from kdtrain.distributed.collectives import gather_ranks
from kdtrain.errors import ConfigError
from kdtrain.models.backbone import Backbone
from kdtrain.models.dtypes import listed_in_float32
from kdtrain.parallel.blocks import is_conv1d
from kdtrain.parallel.experts import expert_modules
from kdtrain.parallel.layers import ColumnParallelLinear, RowParallelLinear
from kdtrain.parallel.variants import ColumnParallelConv1D, LatentLinear, RowParallelConv1D


def require_torchao(kind: str) -> None:
    """Raise ConfigError, with the command that installs it, if torchao is missing. kind: as teacher.quantize."""
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"teacher.quantize = {kind}: the package torchao is not installed\n"
            "  why: it holds and multiplies the 8-bit weights\n"
            "  fix: pip install 'torchao>=0.18', or set teacher.quantize=null"
        )


@torch.no_grad()
def quantize_decoder_(backbone: Backbone, kind: str) -> tuple[int, int]:
    """Replace the weights of the decoder's linear layers, one layer after the other; (bytes before, bytes after).

    kind: int8, or fp8 (float8_e4m3). Embedding, head, norms and biases stay as they are. Bytes: all parameters of this
    rank, scales included. Every rank must call it. Communicates over tp: one small all-gather per layer whose inputs
    are sharded. Raises ConfigError, in every layout alike, if torchao or a linear layer is missing, for a mixture of
    experts and for Conv1D layers.
    """
    require_torchao(kind)
    before, layers = _parameter_bytes(backbone), quantizable_layers(backbone.model, kind)
    for layer in layers:
        weight = layer.weight
        largest = None
        if isinstance(layer, RowParallelLinear):
            here = nn.functional.pad(weight.abs(), (0, 1)).amax(1, keepdim=True)  # padded: a rank may have no inputs
            # Scales are per output row; each rank has only its inputs of the row, and all layouts must round alike.
            largest = gather_ranks(here, layer.group).amax(0)
        if weight.numel():
            layer.weight = nn.Parameter(_quantized(weight, kind, largest), requires_grad=False)
    return before, _parameter_bytes(backbone)


def quantizable_layers(model: Any, kind: str) -> list[Any]:
    """The decoder's linear layers in a stock model, sharded or not, possibly on meta. Raises as `quantize_decoder_`.

    Excludes layers that the model's class keeps in float32: if bfloat16 is too coarse for them, so are 8 bits. The list
    is the same in every layout: nn.Linear of the whole model becomes one of these classes when it is sharded.
    """
    decoder, classes = model.base_model, (nn.Linear, ColumnParallelLinear, RowParallelLinear, LatentLinear)
    named = decoder.named_modules(prefix=model.base_model_prefix)
    float32 = listed_in_float32(model)
    found = [
        module
        for name, module in named
        if isinstance(module, classes) and not (float32 and float32.search(f"{name}.weight"))
    ]
    if next(expert_modules(model), None) is not None:
        what, why = "is a mixture of experts", "packed experts, nearly all of a mixture's weights, are not"
    elif any(_is_transposed(module) for module in decoder.modules()):
        what, why = "has Conv1D layers", "these layers keep inputs x outputs"
    elif not found:
        what, why = "has no linear layer", "there is none here"
    else:
        return found
    raise ConfigError(
        f"teacher.quantize = {kind}: {type(model).__name__} {what}\n"
        f"  why: torchao's tensors are matrices, outputs x inputs; {why}\n"
        "  fix: set teacher.quantize=null; teacher.layout=tp or teacher.zero_stage=3 divide the weights"
    )


def _is_transposed(module: nn.Module) -> bool:
    return is_conv1d(module) or isinstance(module, (ColumnParallelConv1D, RowParallelConv1D))


def _quantized(weight: Tensor, kind: str, largest: Tensor | None) -> Any:
    """Weight [out, in] as an 8-bit tensor subclass.

    largest [out, 1]: largest magnitude per row over all ranks, if inputs are sharded.
    """
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow

    weight = weight.detach()
    rows = PerRow()
    if kind == "int8":
        scale = None
        if largest is not None:  # torchao derives the scale from a matrix, here one of two columns
            scale = Int8Tensor.from_hp(torch.cat([largest, torch.zeros_like(largest)], 1), granularity=rows).scale
        return Int8Tensor.from_hp(weight, granularity=rows, scale=scale)
    if largest is None:
        return Float8Tensor.from_hp(weight, granularity=rows)
    # This class takes no scale: quantise with an extra column that determines it, and drop that column afterwards.
    whole = Float8Tensor.from_hp(torch.cat([weight, largest], 1), granularity=rows)
    return Float8Tensor(
        whole.qdata[:, :-1].contiguous(),
        whole.scale,
        [1, weight.shape[1]],
        whole.mm_config,
        whole.act_quant_kwargs,
        whole.kernel_preference,
        whole.dtype,
    )


def _parameter_bytes(backbone: Backbone) -> int:
    return sum(_stored_bytes(param.data) for _, param in backbone.hf_parameters())


def _stored_bytes(tensor: Any) -> int:
    """Bytes of an ordinary tensor, or of the tensors inside a tensor subclass."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(_stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
