"""How many positions a model has: measured on a tiny copy if there is a hard limit, read from the config if it is only
the trained length. Nothing here communicates.

Learned positions, tables of sines and some masks have a hard limit: a longer sequence fails in the middle of a run, on
a GPU with an uninformative assertion. Rotary embeddings and ALiBi have none, but past its trained length a model
predicts badly without any error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdtrain.errors import ConfigError
from kdtrain.log import LOGGER
from kdtrain.models.load import ModelSpec, build_config
from kdtrain.models.probe import run_on_copy
from kdtrain.models.shrink import VOCAB_SIZE
from kdtrain.models.stock import BUILD_ERRORS, parameters_on_meta, stock_model

DECLARED = (
    "max_position_embeddings",
    "n_positions",
    "max_target_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
    "context_length",
)
"""Keys of a config that give the number of positions of a model, under every name in use."""

FEW, SLACK = 16, 4
"""FEW: positions set in the config of a copy.

SLACK: by how many the copy may have more or fewer than its config states.
"""


@dataclass(frozen=True, slots=True)
class Positions:
    """Positions of a model.

    end: its hard limit, None if it is not below the length searched. declared: the config's number.
    """

    end: int | None
    declared: dict[str, int]


def check_positions(spec: ModelSpec, role: str, *, vocab_size: int, seq_len: int, trainable: bool) -> None:
    """Raise ConfigError if the model of `spec` has no positions for sequences of seq_len tokens; warn if it was made
    for fewer.

    role: "teacher" or "student", for messages. vocab_size: tokens of the tokenizer. Reads config.json alone; builds and
    runs tiny random copies on the CPU; leaves torch's random state unchanged. Raises ConfigError also for what
    `build_config` refuses and for a model of which no copy can be run.
    """
    source = f"the {role} {(spec.weights or spec.architecture)!r}"
    with parameters_on_meta():
        config = build_config(spec, vocab_size, trainable=trainable)
        model = stock_model(config, source)
    found = positions_of(model, source, seq_len)
    if found.end is not None:
        raise ConfigError(
            f"data.seq_len = {seq_len} is more than the {found.end} positions of {source}\n"
            f"  why: they are a table that ends: a tiny copy of the model cannot be run past position {found.end - 1}\n"
            f"  fix: set data.seq_len to {found.end} or less, or use a model with more positions"
        )
    key = min(found.declared, key=lambda name: found.declared[name], default=None)
    if key is not None and found.declared[key] < seq_len:
        LOGGER.warning(
            "data.seq_len = %d is more than the %d positions that %s was made for (%s in its config): where documents "
            "are longer, it extrapolates",
            seq_len,
            found.declared[key],
            source,
            key,
        )


def positions_of(model: Any, source: str, seq_len: int) -> Positions:
    """The `Positions` of `model`, searched up to seq_len. Raises ConfigError when no copy can be run."""
    config = model.config.get_text_config()
    settings = config.to_dict()
    declared = {key: value for key in DECLARED if type(value := settings.get(key)) is int and value > 0}
    ends = [run_on_copy(model, source, partial(_table, seq_len=seq_len))]
    for key, value in declared.items():
        if value - SLACK < seq_len and key in model.config.to_dict():
            few = _few_positions(model, source, key)
            ends.append(None if few is None else value - FEW + few)
    known = [end for end in ends if end is not None and end < seq_len]
    return Positions(min(known, default=None), declared)


def _few_positions(model: Any, source: str, key: str) -> int | None:
    """Tokens that a copy can run at once when its config states FEW; None if more, or if no such copy can be made."""
    try:
        return run_on_copy(model, source, _longest, {key: FEW})
    except ConfigError:
        return None  # the setting depends on others; only the warning remains


def _table(copy: Any, *, seq_len: int) -> int | None:
    """The number of positions at which the copy can run one token, by bisection; None if seq_len or more."""

    def works(position: int) -> bool:
        return _runs(copy, torch.tensor([[position]]))

    _run(copy, torch.tensor([[0]]))
    if works(seq_len - 1):
        return None
    last, past = 0, seq_len - 1
    while past - last > 1:
        middle = (last + past) // 2
        last, past = (middle, past) if works(middle) else (last, middle)
    return past


def _longest(copy: Any) -> int | None:
    """Tokens of the longest sequence that the copy can run, None if FEW + SLACK or more."""
    _run(copy, torch.arange(FEW - SLACK)[None])
    lengths = range(FEW - SLACK + 1, FEW + SLACK + 1)
    return next((length - 1 for length in lengths if not _runs(copy, torch.arange(length)[None])), None)


def _runs(copy: Any, position_ids: Tensor) -> bool:
    try:
        _run(copy, position_ids)
    except BUILD_ERRORS:
        return False
    return True


def _run(copy: Any, position_ids: Tensor) -> None:
    ids = torch.full_like(position_ids, VOCAB_SIZE - 1)
    copy.base_model(input_ids=ids, position_ids=position_ids, attention_mask=None, use_cache=False)
