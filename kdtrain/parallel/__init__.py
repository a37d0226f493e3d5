"""Tensor parallelism applied from outside to stock Hugging Face models."""

from kdtrain.parallel.cut import Cut, even_cut, padded_cut
from kdtrain.parallel.pieces import merge_state_dict, split_state_dict
from kdtrain.parallel.plan import plan_cuts, read_plan
from kdtrain.parallel.shard import shard_model

__all__ = [
    "Cut",
    "even_cut",
    "merge_state_dict",
    "padded_cut",
    "plan_cuts",
    "read_plan",
    "shard_model",
    "split_state_dict",
]
