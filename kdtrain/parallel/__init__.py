"""Tensor parallelism for stock Hugging Face models, without changes to their code."""

from kdtrain.parallel.plan import plan_shards, read_plan
from kdtrain.parallel.shard import shard_model
from kdtrain.parallel.shard_spec import ShardSpec, even_spec, padded_spec
from kdtrain.parallel.shard_tensors import merge_state_dict, split_state_dict

__all__ = [
    "ShardSpec",
    "even_spec",
    "merge_state_dict",
    "padded_spec",
    "plan_shards",
    "read_plan",
    "shard_model",
    "split_state_dict",
]
