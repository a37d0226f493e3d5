"""Megatron sequence parallelism: between blocks each tensor-parallel rank holds S/tp of the tokens.

Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.2. A decoder layer consists of blocks (attention, MLP), which
need all tokens, and of norms and additions, which work token by token. The first layer takes this rank's S/tp tokens of
the replicated embeddings; every block gathers its input and reduce-scatters its output; after the last layer the tokens
are joined again, so embedding, final norm and loss are unchanged. It communicates as many bytes as the all-reduces that
it replaces. Activations that a layer saves for backward outside of blocks, and the layer inputs that recomputation
saves, are smaller by a factor of tp.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdtrain.distributed.collectives import Group, divide_tokens, join_tokens
from kdtrain.errors import ParallelError
from kdtrain.parallel.blocks import Block
from kdtrain.parallel.layers import hook_block_input
from kdtrain.parallel.plan import TpPlan


def token_wise_parameters(model: Any, plan: TpPlan) -> list[str]:
    """Names of the replicated parameters of `model`'s layers that are applied to this rank's tokens only.

    These are parameters of norms and biases of row layers. Call it before the model is sharded. Raises ParallelError
    for a layer with other parameters outside of its blocks, which may combine tokens; for sharded layers outside of a
    block; and for blocks that do not gather their own input.
    """
    blocks = plan.blocks
    odd = [*plan.gathered, *plan.split, *(block.name for block in blocks if block.copies_inputs)]
    if odd:
        raise ParallelError(
            f"{odd[0]!r} of {type(model).__name__} is sharded in a way that does not gather its input once\n"
            "  why: with sequence parallelism every sharded layer must be in a block that gathers the tokens\n"
            "  fix: set parallel.sequence=false for this architecture"
        )
    names = {block.name for block in blocks}
    found = [f"{block.row}.bias" for block in blocks if model.get_submodule(block.row).bias is not None]
    for layer in _layers(model, blocks):
        for name, _ in model.get_submodule(layer).named_parameters(prefix=layer):
            owner = name.rpartition(".")[0]
            if any(owner == block or owner.startswith(f"{block}.") for block in names):
                continue
            kind = type(model.get_submodule(owner)).__name__
            if not kind.endswith("Norm"):
                raise ParallelError(
                    f"{name!r} belongs to a {kind} outside of the attention and MLP blocks of {layer!r}\n"
                    "  why: with sequence parallelism it would be applied to a part of the tokens, and only norms are "
                    "known to work token by token\n"
                    "  fix: set parallel.sequence=false for this architecture"
                )
            found.append(name)
    return found


def divide_layers(model: Any, plan: TpPlan, group: Group) -> None:
    """Divide hidden states [B, S, D] by token before the first decoder layer and join them after the last.

    Communicates: one all-gather per forward pass and one per backward pass.
    """
    layers = _layers(model, plan.blocks)
    hook_block_input(model.get_submodule(layers[0]), group, _divide)

    def join(module: nn.Module, args: Any, output: Any) -> Any:
        # Final norm and head have replicated inputs: they need all tokens.
        if isinstance(output, tuple):
            return (join_tokens(output[0], group), *output[1:])
        return join_tokens(output, group)

    model.get_submodule(layers[-1]).register_forward_hook(join)


def _divide(hidden: Tensor, group: Group) -> Tensor:
    try:
        # Only the backward communicates: the embedding needs the gradients of all tokens.
        return divide_tokens(hidden, group)
    except ValueError as error:
        raise ParallelError(
            f"sequence parallelism: {error}\n  fix: make data.seq_len a multiple of parallel.tp, or set "
            "parallel.sequence=false"
        ) from error


def _layers(model: Any, blocks: Sequence[Block]) -> list[str]:
    """Names of the decoder layers, in order. Raises ParallelError unless each of one list's layers holds a block."""
    lists = {match.group(1) for block in blocks if (match := re.match(r"(.*?)\.\d+\.", f"{block.name}."))}
    if len(lists) == 1:
        parent = lists.pop()
        layers = [f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children()]
        if all(any(block.name.startswith(f"{layer}.") for block in blocks) for layer in layers):
            return layers
    raise ParallelError(
        f"the decoder layers of {type(model).__name__} cannot be found from its tensor-parallel plan\n"
        "  why: sequence parallelism divides tokens before the first layer, and every layer must have a block that "
        "gathers them\n  fix: set parallel.sequence=false for this architecture"
    )
