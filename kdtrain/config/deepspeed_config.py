"""The settings DeepSpeed must be given, as a pure function of the configuration. Imports no deepspeed."""

from __future__ import annotations

from typing import Any

from kdtrain.config.schema import RunConfig

OWNED_ZERO_KEYS = (
    "stage",
    "overlap_comm",
    "offload_optimizer",
    "offload_param",
    "ignore_unused_parameters",
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "zero_hpz_partition_size",
    "mics_shard_size",
)
"""Keys of zero_optimization that zero.extra may not set: kdtrain decides them, or does not support what they do."""


def deepspeed_config(cfg: RunConfig, *, on_cuda: bool) -> dict[str, Any]:
    """A fresh dictionary for `deepspeed.initialize`, which writes into it.

    Gradients are accumulated and reduced in float32 (DeepSpeed's default is the model's dtype), and accumulation is
    not managed: any number of backward calls, then one step. The optimizer is ours and not described here.
    """
    return {
        "train_micro_batch_size_per_gpu": cfg.data.sequences_per_micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # always stated: without the key DeepSpeed clips at 1
        "gradient_clipping": cfg.optim.grad_clip or 0.0,
        "bf16": {"enabled": cfg.student.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": cfg.zero.stage,
            "overlap_comm": on_cuda and cfg.zero.stage == 2,
            **cfg.zero.extra,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "checkpoint": {"tag_validation": "Fail"},
    }
