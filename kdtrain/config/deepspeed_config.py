"""DeepSpeed's settings as a pure function of the configuration. Imports no deepspeed."""

from __future__ import annotations

from typing import Any, Literal

from kdtrain.config.schema import Dtype, ZeroSection

NEVER = 10**9
"""A number of steps no run reaches."""

REDUCE_BUCKET = 500_000_000
"""Most elements of gradients that are reduced at once, unless zero.extra sets it: DeepSpeed's own default."""

EXTRA_ZERO_KEYS: dict[str, Literal["count", "size", "switch"]] = {
    "reduce_bucket_size": "size",
    "allgather_bucket_size": "count",
    "sub_group_size": "count",
    "stage3_prefetch_bucket_size": "count",
    "stage3_param_persistence_threshold": "count",
    "stage3_model_persistence_threshold": "count",
    "stage3_max_live_parameters": "count",
    "stage3_max_reuse_distance": "count",
    "stage3_module_granularity_threshold": "count",
    "stage3_use_all_reduce_for_fetch_params": "switch",
    "stage3_allgather_sequential": "switch",
    "reduce_scatter": "switch",
    "use_multi_rank_bucket_allreduce": "switch",
    "allgather_partitions": "switch",
    "memory_efficient_linear": "switch",
    "log_trace_cache_warnings": "switch",
    "enable_sanity_checks": "switch",
}
"""Keys of zero_optimization that zero.extra may set: they trade memory for speed. Counts and sizes are of elements;
DeepSpeed refuses a size of 0."""

OWNED_ZERO_KEYS: dict[str, str] = {
    "stage": "it is zero.stage",
    "overlap_comm": "it depends on the stage: DeepSpeed refuses it in stages 0 and 1 with unmanaged accumulation",
    "compute_grad_norm": "the norm is reported and clipped in every run",
    "offload_optimizer": "it is zero.offload_optimizer, with which no operator is compiled",
    "offload_param": "it needs stage 3 with weights fetched from the host in every layer; it is not supported",
    "contiguous_gradients": "accumulation over any number of micro-batches is tested with it only",
    "round_robin_gradients": "it changes which rank holds which optimizer state",
    "zenflow": "it changes when gradients are applied",
    "zero_hpz_partition_size": "ZeRO++ is not supported: its group is one per process",
    "zero_quantized_weights": "ZeRO++ is not supported: it rounds the weights",
    "zero_quantized_nontrainable_weights": "ZeRO++ is not supported: it rounds the weights",
    "zero_quantized_gradients": "ZeRO++ is not supported: it rounds the gradients",
    "mics_shard_size": "DeepSpeed has removed it",
    "legacy_stage1": "stage 1 has one implementation here",
    "parameter_alignment": "it pads what checkpoints read",
    "save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
    "elastic_checkpoint": "checkpoints are kdtrain's own and readable in any layout",
    "load_from_fp32_weights": "checkpoints are kdtrain's own",
    "pipeline_loading_checkpoint": "checkpoints are kdtrain's own",
    "stage3_gather_16bit_weights_on_model_save": "export is kdtrain's own",
    "stage3_gather_fp16_weights_on_model_save": "export is kdtrain's own",
    "ignore_unused_parameters": "a parameter without a gradient is a fault here",
    "leaf_module": "kdtrain sets where weights are gathered",
    "override_module_apply": "kdtrain sets where weights are gathered",
}
"""Keys that zero.extra may not set, and why."""


def reduce_bucket(zero: ZeroSection, num_parameters: int) -> int:
    """Elements of a bucket of gradients. num_parameters: trainable ones on this rank, before ZeRO divides them.

    DeepSpeed allocates the whole bucket for any model, so it is limited to the size of the model: with all gradients in
    one bucket the same elements are reduced together as before, and no number changes. zero.extra wins.
    """
    return int(zero.extra.get("reduce_bucket_size", max(1, min(REDUCE_BUCKET, num_parameters))))


def deepspeed_config(
    zero: ZeroSection,
    *,
    grad_clip: float | None,
    dtype: Dtype,
    sequences_per_micro_batch: int,
    on_cuda: bool,
    num_parameters: int,
) -> dict[str, Any]:
    """A fresh dictionary for `deepspeed.initialize`, which writes into it. num_parameters: as for `reduce_bucket`.

    Gradients are accumulated and reduced in float32 (DeepSpeed's default is the model's dtype), and accumulation is
    not managed: any number of backward calls, then one step. The optimizer, the schedule and all reports are kdtrain's
    not described here. Communication overlaps with backward on CUDA in stages 2 and 3, which reduce gradients during
    backward. DeepSpeed's other sizes need no bound: they limit allocations, or (allgather_bucket_size) are not used.
    """
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": on_cuda}} if zero.offload_optimizer else {}
    return {
        "train_micro_batch_size_per_gpu": sequences_per_micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # always stated: without the key DeepSpeed clips at 1
        "gradient_clipping": 0.0 if grad_clip is None else grad_clip,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            **zero.extra,
            **offload,
            "reduce_bucket_size": reduce_bucket(zero, num_parameters),
            "stage": zero.stage,
            "overlap_comm": on_cuda and zero.stage >= 2,
        },
        # without this, offloading requires DeepSpeed's own Adam, which is compiled when the run starts
        "zero_force_ds_cpu_optimizer": False,
        # kdtrain passes torch's AdamW, which is not on DeepSpeed's list of classes it has tried
        "zero_allow_untested_optimizer": True,
        "steps_per_print": NEVER,
        "checkpoint": {"tag_validation": "Fail"},
    }


def frozen_config(dtype: str, *, offload: bool) -> dict[str, Any]:
    """Settings for a frozen model under ZeRO-3: no optimizer, every weight divided, the next layer fetched ahead.

    Without an optimizer DeepSpeed allocates no bucket.
    """
    # memory_efficient_linear would replace torch's own function, for the whole process
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
        "steps_per_print": NEVER,
    }
