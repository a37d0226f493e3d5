"""What a teacher hands to a loss. T tokens, E teacher width."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdtrain.dist.vocab import HeadShard


@dataclass(frozen=True, slots=True)
class DenseSignal:
    """The whole teacher distribution, as hidden states and the head that turns them into logits.

    hidden_states [T, E], equal on every rank of the student's tp group, no grad; head: this rank's rows, cut like
    the student's head.
    """

    hidden_states: Tensor
    head: HeadShard
