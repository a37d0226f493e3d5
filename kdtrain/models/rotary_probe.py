"""Measure, before a weight is read, whether a document's hidden states depend on longer ones in its forward pass.

`kdtrain.models.rotary` handles the types of rotary embeddings that are known to do so. An unknown one would not be
detected by documents of a few tokens, which do not reach the lengths at which tables change. So a tiny random copy is
made of the config to be loaded in which those lengths are a few tokens, and run with and without a long neighbour.
Nothing here communicates.
"""

from __future__ import annotations

import copy as copying
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdtrain.errors import ConfigError
from kdtrain.models.probe import TOLERANCE, difference, run_on_copy
from kdtrain.models.rotary import rope_types, use_document_lengths
from kdtrain.models.shrink import VOCAB_SIZE

SHORTEST = 6
"""Tokens in the copy of the shortest length that the config's rotary embeddings name."""

LONGEST = 256
"""Tokens in the copy that no such length exceeds."""

_LENGTH = re.compile(r"max_position|length|seq_len")


def check_neighbours(model: Any, source: str, *, packed: bool = True) -> None:
    """Raise ConfigError if a document's hidden states depend on the length of others that share its forward pass.

    model: the stock model, parameters possibly on meta; it is not run. source: its name in messages. packed: whether
    position_ids restart at documents. Builds and runs a tiny random copy on the CPU, with the rotary embeddings that
    `use_document_lengths` gives it, when the model has rotary embeddings of another type than "default"; leaves torch's
    random state unchanged. Raises ConfigError also when no such copy can be run.
    """
    kinds = sorted({kind for module in model.modules() for kind in rope_types(module)} - {"default"})
    if not kinds:
        return
    changes = _shrunk(model.config.to_dict())
    apart, alone = run_on_copy(model, source, partial(_measure, source=source, packed=packed), changes)
    kind = f"{source} has rotary embeddings of the type {', '.join(kinds)}"
    if apart > TOLERANCE:
        raise ConfigError(
            f"{kind}: hidden states of short documents change by {apart:.2g} of their size when a long document shares "
            "their forward pass\n"
            "  why: a document's distribution would depend on its neighbours, so on micro-batch and layout\n"
            "  fix: set data.reset_positions=false and parallel.cp=1 (all documents are then as long as the sequence, "
            "which is on one rank), or use a model with another rope_type"
        )
    if alone > TOLERANCE:
        raise ConfigError(
            f"{kind}, which depends on length: with the tables of each document's own length, hidden states of packed "
            f"documents differ by {alone:.2g} of their size from those of each document alone\n"
            "  why: the model would not compute what it was trained to\n"
            "  fix: use a model with another rope_type"
        )


def _shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """Top-level settings that make every length of rotary embeddings a few tokens, in the same proportions."""
    inside = [(key, value) for key, value in settings.items() if "rope" in key and isinstance(value, dict)]
    outside = {key: value for key, value in settings.items() if _is_length(key, value) and "max_position" in key}
    lengths = [*outside.values(), *(n for _, value in inside for n in _lengths(value))]
    if not lengths:
        return {}
    unit = min(lengths)
    return {
        **{key: _few(value, unit) for key, value in outside.items()},
        **{key: _replaced(value, unit) for key, value in inside},
    }


def _is_length(key: str, value: Any) -> bool:
    return _LENGTH.search(key) is not None and type(value) is int and value > 1


def _few(length: int, unit: int) -> int:
    return min(LONGEST, max(SHORTEST, round(SHORTEST * length / unit)))


def _lengths(parameters: dict[str, Any]) -> Iterator[int]:
    for key, value in parameters.items():
        if isinstance(value, dict):
            yield from _lengths(value)
        elif _is_length(key, value):
            yield value


def _replaced(parameters: dict[str, Any], unit: int) -> dict[str, Any]:
    return {
        key: _replaced(value, unit)
        if isinstance(value, dict)
        else _few(value, unit)
        if _is_length(key, value)
        else copying.deepcopy(value)
        for key, value in parameters.items()
    }


def _measure(copy: Any, *, source: str, packed: bool) -> tuple[float, float]:
    """(a long neighbour's effect on documents of 4 tokens, documents against the stock copy's of each alone), relative.

    The second is 0 where no rotary embedding was replaced. Its documents are shorter and longer than every length at
    which a table may change; one long one if they are not packed.
    """
    longest = int(getattr(copy.config, "max_position_embeddings", SHORTEST)) + SHORTEST
    sizes = sorted([4, SHORTEST + 3, SHORTEST + 5, longest]) if packed else [longest]
    straight = torch.arange(sum(sizes))
    ids = torch.randint(4, VOCAB_SIZE, (2, len(straight)))
    fours = straight % 4
    documents = torch.cat([torch.arange(size) for size in sizes])

    def hidden(token_ids: Tensor, *positions: Tensor) -> Tensor:
        found: Tensor = copy.base_model(
            input_ids=token_ids, position_ids=torch.stack(positions), attention_mask=None, use_cache=False
        ).last_hidden_state
        return found

    # one pass per document, the shortest first: stock code keeps state from longer ones
    parts = torch.split(ids[0], sizes)
    alone = [hidden(part[None], torch.arange(len(part)))[0] for part in parts]
    replaced = use_document_lengths(copy, source)
    apart = difference(hidden(ids, fours, straight)[0], hidden(ids, fours, fours)[0])
    if not replaced:
        return apart, 0.0
    together = torch.split(hidden(ids, documents, straight)[0], sizes)
    return apart, max(difference(found, want) for found, want in zip(together, alone, strict=True))
