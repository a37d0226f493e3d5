"""Rotary embeddings whose tables depend on the longest position of a forward pass, changed to depend on each document
only.

Two rotary types in transformers depend on the largest position: `longrope` (Phi-3.5, Phi-4-mini) selects one of two
tables by it, `dynamic` (NTK) computes a table from it. Stock code uses the maximum over all positions of a pass, so a
short document gets another distribution beside a long one than alone. Here the stock module runs once for each table
that the documents of a pass need, and every token takes the values from the table of its own document. A packed
document then has the same output as the document alone in the stock model, whatever else is in its pass, its
micro-batch or on other ranks.

B sequences, S tokens of each on this rank, d the rotated width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtrain.distributed.collectives import Group, group_rank
from kdtrain.documents import document_begins
from kdtrain.errors import ConfigError
from kdtrain.log import LOGGER
from kdtrain.models.context import whole_sequences

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Types of rotary embeddings in transformers whose tables depend on the largest position of a pass."""


class DocumentRotary(nn.Module):
    """Replaces a stock rotary embedding of a length-dependent type: uses the table of each document's own length.

    stock: the replaced module, which computes the tables. group: the ranks that hold consecutive parts of the same
    sequences. Other attributes are those of the stock module.
    """

    def __init__(self, stock: nn.Module, group: Group = None) -> None:
        super().__init__()
        self.stock = stock
        self.group = group

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("stock"), name)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """What `stock` returns for position_ids [..., B, S]: tensors [B, S, d].

        Communicates over `group`, if it has several ranks: one all-gather of position_ids. With the type `dynamic` it
        synchronises the device, as stock code does. Raises ConfigError when the stock module's output has another
        shape.
        """
        more = {} if layer_type is None else {"layer_type": layer_type}
        kind = self.rope_type if layer_type is None else self.rope_type[layer_type]
        if not _is_length_dependent(str(kind)):
            return self.stock(x, position_ids, **more)
        if kind != "longrope":  # restore the first table: stock code keeps the table of a long document
            self.stock(x, torch.zeros_like(position_ids[..., :1]), **more)
        answer: Any = None
        for mask, last in self._tables(str(kind), layer_type, self._lengths(position_ids)):
            # an extra token at the last position of the longest document, which may be on another rank
            positions = F.pad(position_ids.where(mask, 0), (0, 1), value=last)
            found = _tokens(self.stock(x, positions, **more), mask)
            answer = found if answer is None else _choose(mask, found, answer)
        return answer

    def _lengths(self, position_ids: Tensor) -> Tensor:
        """[..., B, S] -> [B, S]: the length of each token's document, parts on other ranks included."""
        rows = position_ids if position_ids.dim() == 2 else position_ids.flatten(0, -3)[0]
        first = group_rank(self.group) * rows.shape[1]
        return document_lengths(whole_sequences(rows, self.group))[:, first : first + rows.shape[1]]

    def _tables(self, kind: str, layer_type: str | None, lengths: Tensor) -> Iterator[tuple[Tensor, int]]:
        """For every table in use: (mask [B, S] of the tokens that use it, a position that makes stock code select
        it)."""
        if kind == "longrope":
            parameters = self.config.rope_parameters
            parameters = parameters if layer_type is None else parameters[layer_type]
            original = int(parameters["original_max_position_embeddings"])
            yield lengths <= original, 0
            yield lengths > original, original
            return
        tables = lengths.clamp(min=int(self.original_max_seq_len))
        for length in torch.unique(tables).tolist():
            yield tables == length, length - 1


def use_document_lengths(model: Any, source: str, group: Group = None) -> list[str]:
    """Replace every length-dependent rotary embedding of `model` in place by `DocumentRotary`; returns their types.

    model: a stock model, on any device. source: its name in messages. group: the ranks that hold parts of the same
    sequences. Does not communicate. Raises ConfigError when the config names such a type and the model has no module
    that could be replaced.
    """
    kinds: set[str] = set()
    made: dict[int, DocumentRotary] = {}
    types = False
    for name, module in list(model.named_modules(remove_duplicate=False)):
        found = rope_types(module)
        types = types or bool(found)
        if any(map(_is_length_dependent, found)):
            kinds.update(filter(_is_length_dependent, found))
            model.set_submodule(name, made.setdefault(id(module), DocumentRotary(module, group)))
    declared = sorted(set(filter(_is_length_dependent, _declared(model.config.to_dict()))))
    if declared and not types:
        raise ConfigError(
            f"{source} declares rotary embeddings of the type {', '.join(declared)}, and {type(model).__name__} has no "
            "module that computes them\n"
            "  why: their tables depend on the longest document of a forward pass, so a document's distribution would "
            "depend on its neighbours; kdtrain replaces the module, and finds none\n"
            "  fix: use a model of another class, or remove the setting from its config.json if the model was not "
            "trained with it"
        )
    return sorted(kinds)


def say_document_lengths(kinds: list[str], source: str) -> None:
    """Log one line for a model with length-dependent rotary embeddings; nothing for others."""
    if kinds:
        LOGGER.info(
            "rotary embeddings of %s are of the type %s, which depends on length: each document uses the tables of its "
            "own length",
            source,
            ", ".join(kinds),
        )


def rope_types(module: nn.Module) -> list[str]:
    """The types that a stock rotary embedding computes: one, or one per kind of layer; none for other modules."""
    found = getattr(module, "rope_type", None)
    return [found] if isinstance(found, str) else list(found.values()) if isinstance(found, dict) else []


def document_lengths(position_ids: Tensor) -> Tensor:
    """[B, S] -> [B, S]: for each token one more than the last position of its document. Does not synchronise."""
    document = document_begins(position_ids).long().cumsum(dim=1) - 1
    last = torch.zeros_like(position_ids).scatter_reduce(1, document, position_ids, "amax")
    return last.gather(1, document) + 1


def _is_length_dependent(kind: str) -> bool:
    return any(name in kind for name in LENGTH_DEPENDENT)


def _declared(settings: Any, inside: bool = False) -> list[str]:
    """Every type that a config names in its settings of rotary embeddings, under the current key or the previous one.

    inside: whether `settings` are such settings.
    """
    if not isinstance(settings, dict):
        return []
    here = [str(settings[key]) for key in ("rope_type", "type") if inside and key in settings]
    return here + [kind for key, value in settings.items() for kind in _declared(value, inside or "rope" in str(key))]


def _tokens(answer: Any, mask: Tensor) -> Any:
    """A stock module's output without its last token. mask [B, S]: the expected shape of the other tokens."""
    if isinstance(answer, tuple):
        return tuple(_tokens(part, mask) for part in answer)
    if not isinstance(answer, Tensor) or answer.dim() != 3 or answer.shape[:2] != (mask.shape[0], mask.shape[1] + 1):
        shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ConfigError(
            f"a rotary embedding returns {shape} for positions {(mask.shape[0], mask.shape[1] + 1)}, one row per token "
            "is needed\n"
            "  why: each document must use the tables of its own length\n  fix: use a model with another rope_type"
        )
    return answer[:, :-1]


def _choose(mask: Tensor, one: Any, other: Any) -> Any:
    """`one` where mask [B, S], else `other`: tensors [B, S, d] or tuples of them."""
    if isinstance(one, tuple):
        return tuple(_choose(mask, *pair) for pair in zip(one, other, strict=True))
    return torch.where(mask[..., None], one, other)
