"""Tensor parallelism applied from outside to stock Hugging Face models."""

from kdtrain.parallel.pieces import merge_state_dict, split_state_dict
from kdtrain.parallel.plan import plan_cuts, read_plan
from kdtrain.parallel.shard import shard_model

__all__ = ["merge_state_dict", "plan_cuts", "read_plan", "shard_model", "split_state_dict"]
