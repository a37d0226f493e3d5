"""The trained model as a loss sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.distributed.vocab import HeadShard

R = TypeVar("R")


class Student(Protocol):
    """The trained model as an objective sees it: runs the decoder, then `head_fn` where the head's weight is whole."""

    def __call__(self, batch: Batch, head_fn: Callable[[Tensor, HeadShard], R]) -> R:
        """hidden_states [T, D] and this rank's head rows go to `head_fn`; its answer comes back."""
