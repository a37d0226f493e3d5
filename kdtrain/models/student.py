"""The interface of the trained model to an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.distributed.vocab import HeadShard

R = TypeVar("R")


class Student(Protocol):
    """Runs the decoder, then calls `head_fn` where the head's weight is complete (gathered under ZeRO-3)."""

    def __call__(self, batch: Batch, head_fn: Callable[[Tensor, HeadShard], R]) -> R:
        """Return head_fn(hidden states [T, D], this rank's head rows)."""
